"""``id3pm-deploy doctor``: what is here, what each recipe needs, what is missing.

``examine.examine`` gathers everything as plain values, ``text.lines`` writes them for
people. Nothing heavy is imported: versions come from package metadata, and what may
crash or hang is tried in child processes. Host name, user name, folders, serial numbers
and addresses are not read, or not repeated.
"""

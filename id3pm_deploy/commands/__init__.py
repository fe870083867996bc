"""One module a command; each is light to import and calls one library function."""

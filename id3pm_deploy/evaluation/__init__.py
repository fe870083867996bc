"""How good pictures are: whose face they show, how they differ, what they remember.

Library functions, each usable alone: ``similarity`` (the paper's measure), ``figures``
(verification and retrieval), ``diversity``, ``pose``, ``features``, ``nearest`` and
``intervals``. ``run`` puts them together for the command ``evaluate``, ``audit`` for
the command of that name.
"""

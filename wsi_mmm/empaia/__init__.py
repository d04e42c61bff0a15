"""EMPAIA: a model as an app of the platform. Bodies of its objects, a client of its App API v3, its description (EAD).

What the platform says of itself was read from its published schemas; where nothing is published, the client accepts
every reasonable answer.
"""

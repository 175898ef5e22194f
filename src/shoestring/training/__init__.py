"""Training: the settings of a run (`config`) and the loop that carries it out (`loop`).

Nothing is imported here: the settings are read without torch, so that the command line is quick.
"""

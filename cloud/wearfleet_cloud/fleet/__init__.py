"""The fleet: who is in it, what it should run, and the keys that say so."""

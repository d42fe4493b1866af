"""The live page of the fleet and the JSON interface beside it."""

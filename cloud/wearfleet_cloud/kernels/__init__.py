"""Hot inner computations: a folder each, with an obvious reference, a processor form, Triton, and the maths."""

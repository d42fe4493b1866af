"""Hot inner computations: in each folder an obvious reference, a form for processors, Triton for GPUs, and the maths."""

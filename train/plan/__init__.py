"""`zoo plan`: memory, time and cost of a job, from the program that the TPU or GPU compiler produces for it."""

"""The SLURM launcher, on a real slurmctld and slurmd."""

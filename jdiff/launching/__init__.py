"""Starting runs: the points of sweeps, and one run on many hosts, on this machine and on others.

Who may live here: what plans, starts and watches `jdiff train`, never what trains. Sweeps: points
of a config, their folder, processes of this machine (`local`) or a SLURM array (`array`). One run
on many hosts: a `Task` that `local_processes`, `slurm`, `gke` or `tpu_vm` plan and submit; each of
these has Options, plan, submit, standing, tail and cancel, and `jobs` keeps what was submitted.
"""

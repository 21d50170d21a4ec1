"""The command `saft-kernels`; `main.main` runs it."""

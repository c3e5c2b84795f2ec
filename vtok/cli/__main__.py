"""`python -m vtok.cli`, which `torchrun -m` needs."""

from vtok.cli import main

main()

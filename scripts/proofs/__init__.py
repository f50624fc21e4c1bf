"""The proofs behind the claims: one module a proof, one function a row.

    rows       what a row is, how rows are run, printed and written to docs/
    outside    the command line as a person runs it, and what it leaves on the machine
    train      the rows of `scripts/prove train`, with `bits`, `staleness`, `trials`, `way_in`
    speed      the rows of `scripts/prove speed`, with `speed_nodes` and `speed_run`
    contest    who is compared there, and how times are put together
    models     what is trained there
    ddp, floor, alone, ray_ps, ray_train, single, counted    the contestants, each a process of its own
    nodes      two network namespaces as two machines
    watching   memory, files and segments of a command's processes
    pictures   of docs/speed.md
    scaling    the rows of `scripts/prove scaling`
    faults     the rows of `scripts/prove faults`, with `strike`

A new proof is a module with a `Proof` named `proof`, a line in `proofs.__main__.PROOFS`, and docs/NAME.md with the two
marks. Rows may use what the tests use: tests/ is on the path.
"""

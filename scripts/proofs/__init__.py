"""The proofs behind the claims: one module a proof, one function a row.

    rows       what a row is, how rows are run, printed and written to docs/
    outside    the command line as a person runs it, and what it leaves on the machine
    train      the rows of `scripts/prove train`
    scaling    the rows of `scripts/prove scaling`

A new proof is a module with a `Proof` named `proof`, a line in `proofs.__main__.PROOFS`, and docs/NAME.md with the two
marks. Rows may use what the tests use: tests/ is on the path.
"""

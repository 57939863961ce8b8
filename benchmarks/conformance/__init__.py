"""PyTorch's own cases through `wrap`: every module and operator that torch tests itself with, against eager.

python -m benchmarks.conformance                   # everything, one worker process; writes results/conformance.json
python -m benchmarks.conformance modules           # torch's module cases only
python -m benchmarks.conformance ops add cat       # these operators only; writes nothing
"""

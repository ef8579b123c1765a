"""Everything worth measuring on a GPU, in one command of ten minutes.

On a machine with a GPU, with torch, transformers, h5py and pytest installed::

    python -m benchmarks.gpu --tiny --out /tmp/tiny.json --budget 60       # does every section run?
    python -m benchmarks.gpu --out gpu.json --budget 450 --data FOLDER     # the measurement
    python -m benchmarks.gpu --out gpu.json --budget 400 --only step,svd   # all of two sections, same file
    python -m benchmarks.gpu --table gpu.json

Without ``--out`` the file is ``benchmarks/results/gpu_<card>.json``. It is rewritten after every row. Sections, in
order of execution: card, layer, step, update, accuracy (needs ``--data``, the CIFAR-10 images), svd, pytest. Each
has a share of the budget; what it leaves unspent goes to the later ones, and what it had no time for stands under
"left out". Without a GPU every section runs in a tiny size on the CPU: that tests the instrument, its figures mean
nothing. To add: a layer kernel is one line in ``layer_variants.VARIANTS``, a way to run a step one line in
``execution.MODES``.
"""

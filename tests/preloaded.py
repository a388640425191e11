"""What the fork server imports once, so that none of the processes forked from it has to: seconds for each.

The server passes over what cannot be imported; the processes then import it themselves.
"""

import importlib

for name in (
    "numpy",
    "pytest",
    "torch",
    "torch.distributed",
    "sympy",  # torch imports it when it is first needed
    "torch._dynamo",  # the same, in an optimizer's first step
    "pretrain_bert",
    "pretrain_gpt",
    "pretrain_mamba",
    "pretrain_t5",
):
    importlib.import_module(name)

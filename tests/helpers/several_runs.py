"""Runs recipes one after the other in each process of one `accelerate launch`, which imports the libraries once.

The argument is a list of command lines in JSON.

accelerate makes DDP of FSDP on a CPU. Here it is told that the processes are those of cards, and their device is a CPU:
everything else, from the plugin that reads the shipped settings to the checkpoints, is accelerate's own.
"""

import json
import os
import runpy
import sys

import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

for call in json.loads(sys.argv[1]):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    sys.argv = call
    runpy.run_path(call[0], run_name="__main__")

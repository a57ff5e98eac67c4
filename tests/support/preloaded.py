"""What the processes of processes.py need not import: libraries, and nothing of mptq."""

import contextlib
import importlib
import io
import logging
import warnings

from tests.support import zoo_mamba

LIBRARIES = """
    jinja2 numba safetensors.torch transformers.models.llama.modeling_llama transformers.models.mixtral.modeling_mixtral
    megatron.core.models.gpt megatron.training.arguments megatron.training.checkpointing
    modelopt.torch.opt.plugins modelopt.torch.quantization
"""

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # on a machine with a CUDA toolkit and no GPU
with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), zoo_mamba.installed():
    warnings.simplefilter("ignore")
    for name in LIBRARIES.split():
        importlib.import_module(name)

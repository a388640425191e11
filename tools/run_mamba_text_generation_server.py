"""Serve a trained Mamba or hybrid model over HTTP: tools/run_text_generation_server.py for models of pretrain_mamba.py.

    python tools/run_mamba_text_generation_server.py --load checkpoints --use-checkpoint-args \
        --spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec \
        --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model tokenizer.model --port 5000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the programs beside this folder

import pretrain_mamba
from megatron.training.errors import exit_at_once_on_error
from tools.run_text_generation_server import serve

if __name__ == "__main__":
    with exit_at_once_on_error():
        serve(pretrain_mamba.model_provider, "mamba")

"""The same model under other people's names: key maps of model families, and reading and writing their files.

- `families` has one module for each family, which says how settings and parameters correspond. It is read both ways.
- `WholeState` is a model as whole tensors under our names, wherever they come from: a Hugging Face directory, a
  checkpoint of any format, a dictionary. Tensors are read one at a time.
- `HFFolder` reads and `write_hf_folder` writes a directory of the `transformers` package, without that package.
- `WholeStateLoadStrategy` fills the shards of any layout from a `WholeState`.

To add a family: write `families/NAME.py` with a generator of `Weight` rows (our name, their names, and `same`,
`transposed`, `stacked`, `fused_qkv`, `fused_heads` for the way of storing) and a `Family` (which settings of ours it
implies, which key of config.json each of the others is), and list it in `families.FAMILIES`. `families/gpt2.py` is
the shortest example.
"""

from .families import FAMILIES, family_of_config, family_of_settings
from .family import Family, NotExpressible
from .hf_folder import HFFolder, HFState, write_hf_folder
from .loading import WholeStateLoadStrategy, load_whole_state
from .mixer_parts import Joined
from .weights import ModelShape, Weight, from_hf, to_hf
from .whole_state import DictState, WholeState, WithVocabulary

__all__ = [
    "DictState",
    "FAMILIES",
    "Family",
    "HFFolder",
    "HFState",
    "Joined",
    "ModelShape",
    "NotExpressible",
    "Weight",
    "WholeState",
    "WholeStateLoadStrategy",
    "WithVocabulary",
    "family_of_config",
    "family_of_settings",
    "from_hf",
    "load_whole_state",
    "to_hf",
    "write_hf_folder",
]

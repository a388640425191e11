"""Name and version of the distribution, in one place: the build and the running program both read them here."""

MAJOR = 0
MINOR = 13
PATCH = 0
PRE_RELEASE = ""

VERSION = (MAJOR, MINOR, PATCH, PRE_RELEASE)

__shortversion__ = f"{MAJOR}.{MINOR}.{PATCH}"
__version__ = f"{__shortversion__}{PRE_RELEASE}"

__package_name__ = "megatron_core"
__description__ = "Building blocks for training transformer language models in parallel"
__license__ = "Apache-2.0"

"""Files that are on the disk when they are closed, with a checksum of what was to be in them.

Imports nothing but numpy and the standard library: the process that writes checkpoints in the background
loads this package alone, so that it starts in a tenth of a second.
"""

from .checksum import ALGORITHM, Checksum, checksum_of_file
from .file import DurableFile, FileRecord, sync_directory, write_durably

__all__ = [
    "ALGORITHM",
    "Checksum",
    "DurableFile",
    "FileRecord",
    "checksum_of_file",
    "sync_directory",
    "write_durably",
]

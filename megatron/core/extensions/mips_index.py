"""Search for the vectors with the largest inner product (maximum inner product search), exact.

With the package faiss its flat index is used, otherwise torch; both give the same rows. q queries, k rows, p width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron.core import device


def _probe() -> Any:
    try:
        import faiss
    except Exception:  # absent, or built for another numpy
        return None
    return faiss


_faiss = _probe()
_ROWS_AT_ONCE = 1 << 16  # bounds the scores held at a time where torch searches


class FaissMIPSIndex:
    """Vectors under ids, and search among them.

    Args:
        embed_size: p.
        embed_data: id -> vector [p] of any float type; kept as fp32.
        use_gpu: search on the accelerator.
        engine: "faiss", "torch", or None: faiss if it is installed.

    Raises:
        ValueError: a vector has another width, or the engine is not known.
        RuntimeError: the engine is not installed, or has no support for an accelerator.
    """

    def __init__(
        self,
        embed_size: int,
        embed_data: Mapping[int, numpy.ndarray] | None = None,
        use_gpu: bool = False,
        *,
        engine: str | None = None,
    ) -> None:
        self.embed_size, self.use_gpu = embed_size, use_gpu
        self.engine = engine or ("torch" if _faiss is None else "faiss")
        if self.engine not in ("faiss", "torch"):
            raise ValueError(f"engine {engine!r} is not known; known are faiss and torch")
        if self.engine == "faiss" and _faiss is None:
            raise RuntimeError("the package faiss is not installed: pip install -e '.[retrieval]' in the repository")
        if use_gpu and self.engine == "faiss" and not hasattr(_faiss, "StandardGpuResources"):
            if engine == "faiss":
                raise RuntimeError("this faiss has no support for GPUs; leave out the engine to search with torch")
            self.engine = "torch"
        self.reset_index()
        if embed_data:
            self.add_embed_data(embed_data)

    def __len__(self) -> int:
        return len(self.ids)

    def reset_index(self) -> None:
        """Forget all vectors."""
        self.ids = numpy.empty(0, numpy.int64)
        self.vectors = numpy.empty((0, self.embed_size), numpy.float32)
        self._index = self._new_index()

    def add_embed_data(self, embed_data: Mapping[int, numpy.ndarray]) -> None:
        """Add vectors under their ids."""
        if not embed_data:
            return
        vectors = numpy.stack([numpy.asarray(vector, numpy.float32) for vector in embed_data.values()])
        if vectors.shape[1:] != (self.embed_size,):
            raise ValueError(f"vectors of shape {list(vectors.shape[1:])}, this index has embed_size {self.embed_size}")
        self.ids = numpy.concatenate([self.ids, numpy.fromiter(embed_data, numpy.int64, len(embed_data))])
        self.vectors = numpy.concatenate([self.vectors, vectors])
        if self._index is not None:
            self._index.add(vectors)

    def search_mips_index(
        self, query_embeds: Tensor | numpy.ndarray, top_k: int, reconstruct: bool = True
    ) -> numpy.ndarray | tuple[numpy.ndarray, numpy.ndarray]:
        """The best rows of each query, best first.

        Args:
            query_embeds: [q, p] of any float type.

        Returns:
            Their vectors [q, k, p] fp32 if `reconstruct`, else (inner products [q, k] fp32, ids [q, k] int64).

        Raises:
            ValueError: there are fewer than `top_k` vectors, or the queries have another width.
        """
        queries = torch.as_tensor(query_embeds).detach().cpu().float()
        if queries.dim() != 2 or queries.size(1) != self.embed_size:
            raise ValueError(f"queries of shape {list(queries.shape)}, expected [q, {self.embed_size}]")
        if not 1 <= top_k <= len(self):
            raise ValueError(f"top_k ({top_k}) must be between 1 and the {len(self)} vectors of the index")
        if self._index is not None:
            scores, rows = self._index.search(queries.numpy(), top_k)
        else:
            scores, rows = self._search_with_torch(queries, top_k)
        return self.vectors[rows] if reconstruct else (scores, self.ids[rows])

    def _new_index(self) -> Any:
        if self.engine != "faiss":
            return None
        assert _faiss is not None
        index = _faiss.IndexFlatIP(self.embed_size)
        if self.use_gpu:
            index = _faiss.index_cpu_to_gpu(_faiss.StandardGpuResources(), 0, index)
        return index

    def _search_with_torch(self, queries: Tensor, top_k: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        where = device.current_device() if self.use_gpu else torch.device("cpu")
        queries = queries.to(where)
        best = queries.new_full((queries.size(0), 0), 0.0)
        rows = torch.empty(queries.size(0), 0, dtype=torch.int64, device=where)
        for begin in range(0, len(self), _ROWS_AT_ONCE):
            part = torch.from_numpy(self.vectors[begin : begin + _ROWS_AT_ONCE]).to(where)
            numbers = torch.arange(begin, begin + part.size(0), device=where).expand(queries.size(0), -1)
            scores = torch.cat([best, queries @ part.T], dim=1)
            best, places = scores.topk(min(top_k, scores.size(1)), dim=1)
            rows = torch.cat([rows, numbers], dim=1).gather(1, places)
        return best.cpu().numpy(), rows.cpu().numpy()

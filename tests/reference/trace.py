"""Reads safetensors files and recomputes dense attention in float64, from nothing but the file's bytes."""

import json
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np

_DTYPES = {"F32": "<f4", "I32": "<i4", "I64": "<i8", "F64": "<f8", "U8": "u1", "F16": "<f2"}


def read_safetensors(path):
    """{name: array}, {metadata}; bf16 is widened to float32, which holds it exactly."""
    data = Path(path).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            bits = np.frombuffer(data[begin:end], "<u2").astype(np.uint32) << 16
            array = bits.view(np.float32)
        else:
            array = np.frombuffer(data[begin:end], _DTYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    return tensors, metadata


class Trace:
    def __init__(self, path):
        self.path = Path(path)
        self.tensors, self.meta = read_safetensors(path)
        self.layers = [int(i) for i in self.meta["captured_layers"].split(",")]
        self.num_layers = int(self.meta["num_layers"])
        self.prompt = int(self.meta["prefill_tokens"])
        self.length = self.prompt + int(self.meta["decode_tokens"])
        self.rope = json.loads(self.meta["rope"])
        self.scales = json.loads(self.meta["softmax_scale"])
        self.question = next((s["begin"] for s in json.loads(self.meta["segments"]) if s["name"] == "question"), None)

    def cut(self, name):
        """Tokens before a cut as the command line names it."""
        return {"end": self.prompt, "before_question": self.question}.get(name) or int(name)


class Layer:
    """Queries, keys and values of one layer, and the dense probabilities of any of its queries."""

    def __init__(self, trace, index):
        self.trace, self.index = trace, index
        self.q, self.k, self.v = (trace.tensors[f"layers.{index}.{x}"].astype(np.float64) for x in "qkv")
        self.v_norms = np.linalg.norm(self.v, axis=2)
        self.scale = float(trace.scales[str(index)])
        self.heads, self.length, self.dim = self.q.shape
        self.kv_heads = self.k.shape[0]
        self.group = self.heads // self.kv_heads
        self.prompt = trace.prompt
        # Every head's triangle at once only where that is a few hundred MB.
        keep = self.heads if self.length <= 2100 else 1
        self._whole = lru_cache(maxsize=keep)(self._compute_whole)
        self._row = lru_cache(maxsize=1024)(lambda head, at: self._compute_rows(head, at, at + 1))

    def kv_of(self, head):
        return head // self.group

    def _compute_rows(self, head, begin, end):
        logits = self.q[head, begin:end] @ self.k[self.kv_of(head), :end].T
        logits *= self.scale
        for i in range(begin, end):
            logits[i - begin, i + 1 :] = -np.inf
        top = logits.max(axis=1, keepdims=True)
        np.exp(logits - top, out=logits)
        total = logits.sum(axis=1, keepdims=True)
        logits /= total
        return logits, (top + np.log(total))[:, 0]

    def _compute_whole(self, head):
        return self._compute_rows(head, 0, self.length)

    def rows(self, head, begin, end):
        """Dense probabilities of the queries at [begin, end) over keys [0, end), and their log-sum-exp."""
        if self.length <= 2100:
            p, lse = self._whole(head)
            return p[begin:end, :end], lse[begin:end]
        if end == begin + 1:
            return self._row(head, begin)
        return self._compute_rows(head, begin, end)

    def window_mass(self, head, begin, end):
        """Sum over the queries at [begin, end) of their probability on every key in [0, end)."""
        total = np.zeros(end)
        for a in range(begin, end, 512):
            b = min(a + 512, end)
            total[:b] += self.rows(head, a, b)[0].sum(axis=0)
        return total

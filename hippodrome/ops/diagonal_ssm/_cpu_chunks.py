"""The steps of diagonal_ssm on the CPU: states, outputs and gradients of one segment of chunks. See `cpu.py`."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hippodrome.ops.diagonal_ssm import _cpu_segments
from hippodrome.ops.diagonal_ssm._cpu_tables import Tables, as_complex


def run(u: Tensor, pre: Tensor | None, part: Tables, z: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Fill v behind its first B rows with the gated inputs and s with the states before each chunk. Returns the last."""
    batch, (_, _, in_map, decay) = u.shape[0], part
    _read(u, v[:, batch:], pre)
    # A chunk's state is driven by the chunk before it. Before the first there is z.
    torch.bmm(v[:, :-batch], in_map, out=s)
    s[:, :batch] = 0
    return _scan(_grid(s, batch), z, decay) + as_complex(torch.bmm(v[:, -batch:], in_map))


def run_back(d_y: Tensor, post: Tensor | None, part: Tables, q: Tensor, d: Tensor, o: Tensor) -> Tensor:
    """Fill d but for its last B rows with the gradients of ungated outputs, o with those of the states after each chunk.

    From the gradient of the state after all, returns that of the state before all.
    """
    batch, owed, decay = d_y.shape[0], part[1].transpose(1, 2), part[3].conj()
    _read(d_y, d[:, :-batch], post)
    torch.bmm(d[:, batch:], owed, out=o)
    o[:, -batch:] = 0
    return _scan(_grid(o, batch), q, decay, reverse=True) + as_complex(torch.bmm(d[:, :batch], owed))


def _scan(z: Tensor, carry: Tensor, decay: Tensor, *, reverse: bool = False) -> Tensor:
    """z_c += decay z_(c-1) in place, for z (H, C, B, N) and with `carry` (H, B, N) added to z_0; c+1 and the last in reverse.

    Returns decay times the last, in complex128. Groups of LANES steps advance at once, each by itself; then what each carries
    into the next, in complex128 one after the other; then what was carried into a group reaches all of its steps. A power
    rounded to float32, 6e-8 off, is so never applied more than LANES times: long memories stay exact.
    """
    lanes, batch, one = min(_cpu_segments.LANES, z.shape[1]), z.shape[2], decay.to(torch.complex128)
    *powers, over = accumulate([one] * lanes, torch.mul, initial=torch.ones_like(one))
    order = slice(None, None, -1 if reverse else 1)

    def over_the_batch(t: Tensor) -> Tensor:
        # Not broadcast: one long inner loop instead of many short ones.
        return t.to(z.dtype).unsqueeze(-2).expand(*t.shape[:-1], batch, -1).contiguous()

    groups, step = z.unflatten(1, (-1, lanes)), over_the_batch(one).unsqueeze(1)
    steps = groups.unbind(2)[order]
    for before, here in pairwise(steps):
        here.addcmul_(step, before)
    ends, given = one[:, None, None] * steps[-1], carry.unsqueeze(1)
    carries = torch.cat([ends, given] if reverse else [given, ends], 1)
    for before, here in pairwise(carries.unbind(1)[order]):
        here.addcmul_(over.unsqueeze(1), before)
    carried, last = (carries[:, 1:], carries[:, 0]) if reverse else (carries[:, :-1], carries[:, -1])
    ladder = over_the_batch(torch.stack(powers[order], 1)).unsqueeze(1)
    groups.addcmul_(ladder, carried.to(z.dtype).unsqueeze(2))
    return last


def answer(v: Tensor, s: Tensor, part: Tables, answers: Tensor) -> None:
    """The outputs before their gate."""
    batch, (toeplitz, owed, _, _) = v.shape[1] - s.shape[1], part
    torch.bmm(v[:, batch:], toeplitz, out=answers).baddbmm_(s, owed)


def answer_back(d: Tensor, o: Tensor, part: Tables, answers: Tensor) -> None:
    """The gradients of the gated inputs."""
    batch, (toeplitz, _, in_map, _) = d.shape[1] - o.shape[1], part
    torch.bmm(d[:, :-batch], toeplitz.transpose(1, 2), out=answers).baddbmm_(o, in_map.transpose(1, 2))


def table_gradients(v: Tensor, s: Tensor, d: Tensor, o: Tensor, into: Tables) -> None:
    """Add the gradients of the tables, but for what is always zero in the Toeplitz matrix."""
    batch, (d_toeplitz, d_owed, d_in, d_decay) = v.shape[1] - s.shape[1], into
    v, d = v[:, batch:], d[:, :-batch]
    for target, left, right in ((d_toeplitz, v, d), (d_owed, s, d), (d_in, v, o)):
        if target.is_contiguous():
            target.baddbmm_(left.transpose(1, 2), right)
        else:
            target += torch.bmm(left.transpose(1, 2), right)
    d_decay += torch.linalg.vecdot(as_complex(s), as_complex(o), dim=1)


def _grid(pairs: Tensor, batch: int) -> Tensor:
    """(H, C B, 2N) as a complex view (H, C, B, N)."""
    return as_complex(pairs.unflatten(1, (-1, batch)))


def state_of(pairs: Tensor) -> Tensor:
    """(B, H, N, 2) as a complex view (H, B, N)."""
    return torch.view_as_complex(pairs).transpose(0, 1)


def _by_chunks(signal: Tensor, chunk: int) -> Tensor:
    """(B, H, C T) as a view (H, C, B, T)."""
    return signal.unflatten(2, (-1, chunk)).permute(1, 2, 0, 3)


def _read(signal: Tensor, chunks: Tensor, gate: Tensor | None) -> None:
    """Copy a signal (B, H, C T), times its gate, into chunks (H, C B, T)."""
    chunk, batch = chunks.shape[2], signal.shape[0]
    by = None if gate is None else _by_chunks(gate, chunk)
    _product(_by_chunks(signal, chunk), by, chunks.unflatten(1, (-1, batch)))


def write(chunks: Tensor, signal: Tensor, gate: Tensor | None) -> None:
    """Copy chunks (H, C B, T), times the gate (B, H, C T), into a signal (B, H, C T)."""
    chunk, batch = chunks.shape[2], signal.shape[0]
    by = None if gate is None else _by_chunks(gate, chunk)
    _product(chunks.unflatten(1, (-1, batch)), by, _by_chunks(signal, chunk))


def _product(a: Tensor, b: Tensor | None, out: Tensor) -> None:
    """a b, or a, into `out`, rounded once."""
    if b is None:
        out.copy_(a)
    elif a.dtype == b.dtype == out.dtype:
        torch.mul(a, b, out=out)
    else:
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        out.copy_(a.to(wide) * b.to(wide))

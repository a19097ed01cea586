"""The most probable words of many rows, without a table of all their probabilities.

The vocabulary is walked in chunks whose logits stay in the processor's cache. Only a chunk's best
words are kept, and the sum of its exponentials: a word's log-probability is its logit less the
logarithm of the sum over all chunks.

Shapes: R rows, H cells, V target words, N places (words of a chunk), G groups, C words kept of a
row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.vocabulary import EOS_ID

# Measured with 12 to 768 rows: larger chunks leave the cache, smaller ones cost calls.
CHUNK_WORDS = 4096
# A GPU has no such cache, and every call costs it a launch. So many logits are 512 MiB.
_GPU_CHUNK_LOGITS = 1 << 27
_GROUP_SIZE = 16
# Below so many words, topk over all of them is as fast as over groups.
_MIN_GROUPED_WORDS = 4096


@dataclass(frozen=True)
class BestWords:
    """Each row's best words (R, C), best first, equal ones by ascending id.

    `values` (R, C) are their log-probabilities and `ends` (R,) those of the end symbol, in float64;
    all of a row are NaN where one of its logits is.
    """

    values: Tensor
    words: Tensor
    ends: Tensor


def best_words(
    outputs: Tensor, weight: Tensor, bias: Tensor, count: int, state_format: torch.dtype
) -> BestWords:
    """Return the best `count` words (or all, if there are fewer) after outputs (R, H).

    The output layer has `weight` (V, H) and `bias` (V,). Its products come in their own format and
    are turned into `state_format`.
    """
    count = min(count, len(weight))
    maximum = outputs.new_full((len(outputs),), -torch.inf, dtype=torch.float64)
    total, ends = torch.zeros_like(maximum), maximum
    values: list[Tensor] = []
    words: list[Tensor] = []
    for start, products in _logit_chunks(outputs, weight, bias):
        logits = products.to(state_format)
        if start <= EOS_ID < start + logits.shape[1]:
            ends = logits[:, EOS_ID - start].to(torch.float64, copy=True)
        floor = None
        if sum(kept.shape[1] for kept in values) >= count:
            floor = torch.cat(values, dim=1).topk(count).values[:, -1]
        places = best_places(logits, count, floor)
        values.append(logits.gather(1, places))
        words.append(places + start)
        before, maximum = maximum, torch.maximum(maximum, values[-1].amax(1).double())
        # In place: nobody reads this chunk's logits again.
        exponentials = logits.sub_(maximum.to(state_format)[:, None]).exp_()
        total = total * (before - maximum).exp() + exponentials.sum(1)
    log_normalizer = maximum + total.log()
    best, ids = _in_order(values, words, count)
    return BestWords(best.double() - log_normalizer[:, None], ids, ends - log_normalizer)


def best_places(values: Tensor, count: int, floor: Tensor | None = None) -> Tensor:
    """Return the places (R, C) of each row's greatest values (R, N), in ascending order.

    C is the smaller of `count` and N. Of equal values, those at lower places are taken, but of
    those not above a row's `floor` (R,) any: so many values that go before them are known already.
    """
    count = min(count, values.shape[1])
    few, places = _candidates(values, count)
    # One more than wanted shows whether the last place is contested: topk may then take any.
    top = few.topk(min(count + 1, few.shape[1]), dim=1)
    chosen = top.indices[:, :count]
    best = (chosen if places is None else places.gather(1, chosen)).sort(dim=1).values
    if top.values.shape[1] > count:
        contested = top.values[:, count] == top.values[:, count - 1]
        # A NaN is greater than all else to topk, and less than nothing to a comparison.
        contested &= ~top.values[:, 0].isnan()
        if floor is not None:
            contested &= top.values[:, count - 1] > floor
        if bool(contested.any()):
            thresholds = top.values[contested, count - 1]
            best[contested] = _first_places(values[contested], thresholds, count)
    return best


def _logit_chunks(outputs: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield a chunk's first word and its logits (R, N), which the next chunk overwrites.

    The last words are followed by logits of minus infinity, so that N is whole groups.
    """
    num_rows, num_words = len(outputs), len(weight)
    size = max(CHUNK_WORDS, _GPU_CHUNK_LOGITS // num_rows) if outputs.is_cuda else CHUNK_WORDS
    size = _whole_groups(min(size, num_words))
    buffer = outputs.new_empty((num_rows, size))
    for start in range(0, num_words, size):
        stop = min(start + size, num_words)
        logits = buffer[:, : _whole_groups(stop - start)]
        torch.addmm(
            bias[start:stop], outputs, weight[start:stop].t(), out=logits[:, : stop - start]
        )
        logits[:, stop - start :] = -torch.inf
        yield start, logits


def _whole_groups(num_words: int) -> int:
    return -(-num_words // _GROUP_SIZE) * _GROUP_SIZE


def _candidates(values: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """Return some of the values with their places, the greatest `count` + 1 among them.

    A group is every G-th place. The greatest k values lie in k groups with the greatest maxima,
    and finding those reads the values once, which is faster than topk. Places are None where all
    values are returned.
    """
    num_places = values.shape[1]
    num_groups, rest = divmod(num_places, _GROUP_SIZE)
    if rest or num_places < _MIN_GROUPED_WORDS or num_groups <= 2 * count:
        return values, None
    maxima = values.view(-1, _GROUP_SIZE, num_groups).amax(1)
    groups = maxima.topk(count + 1, dim=1, sorted=False).indices
    firsts = torch.arange(0, num_places, num_groups, device=values.device)
    places = (groups[:, None, :] + firsts[None, :, None]).flatten(1)
    return values.gather(1, places), places


def _first_places(values: Tensor, thresholds: Tensor, count: int) -> Tensor:
    """Return the places (R, C) of values (R, N) above a row's threshold, then the first ones at it.

    The threshold (R,) is the row's value number `count`, from the greatest on. Ascending.
    """
    above = values > thresholds[:, None]
    at = values == thresholds[:, None]
    missing = count - above.sum(1, keepdim=True)
    taken = above | (at & (at.cumsum(1, dtype=torch.int32) <= missing))
    return taken.nonzero()[:, 1].view(len(values), count)


def _in_order(values: list[Tensor], words: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return the best `count` of all chunks' values (R, C) with their words: by value, then by id.

    The words come in ascending order.
    """
    all_values, all_words = values[0], words[0]
    if len(values) > 1:
        all_values, all_words = torch.cat(values, dim=1), torch.cat(words, dim=1)
        places = best_places(all_values, count)
        all_values, all_words = all_values.gather(1, places), all_words.gather(1, places)
    best, order = all_values.sort(dim=1, descending=True, stable=True)
    return best, all_words.gather(1, order)

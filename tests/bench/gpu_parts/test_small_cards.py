import pytest
import torch

from bench.gpu_parts.small_cards import CUDA_GIB, Card, largest_pass, memory_share

PASSES = (512, 1024, 2048, 4096)


def train_up_to(most):
    def train(pass_tokens):
        if pass_tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"texts_per_second": pass_tokens / 10}

    return train


def test_the_largest_pass_that_fits_is_found():
    assert largest_pass(train_up_to(2048), PASSES) == {
        "pass_tokens": 2048, "texts_per_second": 204.8,
    }  # fmt: skip


def test_a_card_on_which_nothing_fits_says_so():
    assert largest_pass(train_up_to(100), PASSES) == {"pass_tokens": 0}


def test_a_card_on_which_all_fits_says_that_no_larger_one_was_tried():
    found = largest_pass(train_up_to(10_000), PASSES)
    assert found["pass_tokens"] == PASSES[-1]
    assert found["larger_ones"] == "not tried"


def test_another_error_is_not_taken_for_a_lack_of_memory():
    def train(pass_tokens):
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        largest_pass(train, PASSES)


def test_the_allocator_has_a_cards_memory_without_what_cuda_takes():
    assert memory_share(Card(8, checkpointing=False), 139) * 139 == pytest.approx(8 - CUDA_GIB)
    assert memory_share(Card(24, checkpointing=False), 16) == 1


def test_cards_are_told_apart_by_name():
    assert Card(8, checkpointing=True).name == "8 GiB, gradient checkpointing"
    assert Card(8, checkpointing=False).name == "8 GiB"

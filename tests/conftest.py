import os

import pytest

os.environ["TQDM_DISABLE"] = "1"                # no progress bars in the reports; set before tqdm is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: E402


@pytest.fixture
def one_thread():
    """Times of a process count the threads that spin at barriers; beside another job that is most of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

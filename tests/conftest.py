import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks of the tests are too small for more


def run(*command, processes=1, check=True, **environment):
    """Run a script of the repository as a user would, with torchrun if `processes` > 1. Returns the ended process."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run([*launcher, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def small_npz(tmp_path_factory):
    """96 images of 8 x 12 pixels in three classes, as an ADM .npz."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("source") / "images.npz"
    np.savez(path, arr_0=rng.integers(0, 256, (96, 8, 12, 3), dtype=np.uint8), arr_1=np.arange(96) % 3)
    return path


@pytest.fixture(scope="session")
def cache(small_npz, tmp_path_factory):
    """A cache of the small images: 8 x 8 pixels, HOG targets for patch 2, two views."""
    import extract_features

    out = tmp_path_factory.mktemp("cache") / "features"
    options = "--image-size 8 --patch 2 --vae none --encoder hog --flip --batch-size 16 --workers 0"
    extract_features.main(["--data", str(small_npz), "--out", str(out), *options.split()])
    return out

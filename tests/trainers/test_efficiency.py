"""What makes training cheaper, and nothing else."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from trainers.efficiency import compile_blocks


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch's compiler needs g++ on a CPU")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_block_computes_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A run that was killed while it compiled leaves half a library in torch's own cache.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.manual_seed(0)
    block = BasicTransformerBlock(dim=8, num_attention_heads=2, attention_head_dim=4, cross_attention_dim=6)
    tokens, words = torch.linspace(-1, 1, 40).view(1, 5, 8), torch.linspace(1, 0, 12).view(1, 2, 6)
    with torch.no_grad():
        expected = block(tokens, encoder_hidden_states=words)
        compile_blocks(torch.nn.Sequential(block))
        torch.testing.assert_close(block(tokens, encoder_hidden_states=words), expected, atol=1e-5, rtol=1e-4)

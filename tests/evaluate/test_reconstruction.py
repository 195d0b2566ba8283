import pytest
import torch

from pipeline.evaluate.reconstruction import Reconstruction
from pipeline.sae import SAE


def test_metrics_on_a_case_worked_by_hand() -> None:
    sae = SAE(
        W_enc_DF=torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]]),
        b_enc_F=torch.tensor([0.0, 0.0, -100.0]),
        W_dec_FD=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]),
        b_dec_D=torch.zeros(2),
    )
    # Latents fire on positive coordinates; only the negative one of the last row is lost.
    x_BD = torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 4.0], [2.0, -4.0]])
    metrics = Reconstruction(sae)
    for rows_BD in x_BD.split(3):
        metrics.update(rows_BD, sae.encode(rows_BD))
    result = metrics.compute()
    variance = float((x_BD - x_BD.mean(dim=0)).square().sum())
    assert result["rows"] == 4
    assert result["fvu"] == pytest.approx(16 / variance)
    assert result["cosine"] == pytest.approx((1 + 1 + 1 + 2 / 20**0.5) / 4)
    assert result["l0"] == pytest.approx((1 + 1 + 2 + 1) / 4)
    assert result["dead_fraction"] == pytest.approx(1 / 3)
    assert result["max_decoder_cosine"] == pytest.approx((0.6 + 0.8 + 0.8) / 3)

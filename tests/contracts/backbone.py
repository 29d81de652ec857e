"""What every backbone must do; each kind's own test inherits this."""

# pyright: basic, reportOptionalSubscript=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportOperatorIssue=false

import pytest
import torch

from trainers.backbone import Condition
from trainers.batch import Geometry
from trainers.errors import ConfigError
from trainers.prompt import Prompt


class BackboneContract:
    """Subclasses provide the fixture `backbone`: a tiny one for 64-px pictures, in float32 on the CPU."""

    @pytest.fixture
    def backbone(self):
        raise NotImplementedError

    def condition(self, backbone, prompts):
        return backbone.condition(backbone.encode_prompts(prompts), [Geometry.whole(64, 64)] * len(prompts))

    def test_everything_is_frozen_and_in_evaluation_mode(self, backbone):
        for network in (backbone.denoiser, backbone.vae, *backbone.text_encoders):
            assert not network.training
            assert not any(parameter.requires_grad for parameter in network.parameters())

    def test_latents_have_the_announced_shape(self, backbone):
        moments = backbone.encode_image(torch.zeros(1, 3, 64, 64))
        assert moments.mean.shape == moments.logvar.shape == (1, *backbone.latent_shape(64, 64))

    def test_a_decoded_picture_has_its_size_back(self, backbone):
        latents = torch.zeros(2, *backbone.latent_shape(64, 64))
        assert backbone.decode(latents).shape == (2, 3, 64, 64)

    def test_what_rests_comes_back_when_it_is_asked(self, backbone, monkeypatch):
        """There is no second device here: what counts is where networks are sent."""
        sent = []
        monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: sent.append((self, str(device))) or self)
        device, encoders = str(backbone.device), list(backbone.text_encoders)
        backbone.rest([])
        assert sent == [(network, "cpu") for network in (backbone.vae, *encoders)]
        sent.clear()
        backbone.rest(encoders)
        assert sent == [(backbone.vae, "cpu")]
        for ask, expected in (
            (lambda: backbone.encode_image(torch.zeros(1, 3, 64, 64)), [backbone.vae]),
            (lambda: backbone.decode(torch.zeros(1, *backbone.latent_shape(64, 64))), [backbone.vae]),
            (lambda: backbone.encode_prompts(["a"]), encoders),
        ):
            sent.clear()
            ask()
            assert sent == [(network, device) for network in expected]

    def test_sampled_latents_have_the_moments_mean_and_deviation(self, backbone):
        moments = backbone.encode_image(torch.rand(1, 3, 64, 64) * 2 - 1)
        zero, one = torch.zeros_like(moments.mean), torch.ones_like(moments.mean)
        mean = backbone.sample_latents(moments, zero)
        unit = backbone.sample_latents(type(moments)(moments.mean + 1, moments.logvar), zero) - mean
        deviation = backbone.sample_latents(moments, one) - mean
        torch.testing.assert_close(deviation, unit * (0.5 * moments.logvar).exp())

    def test_a_prompts_embedding_does_not_depend_on_its_neighbours(self, backbone):
        alone = backbone.encode_prompts(["b"])
        among = backbone.encode_prompts(["a", "b", "a long prompt"]).select([1])
        assert alone.tensors().keys() == among.tensors().keys()
        for name, value in alone.tensors().items():
            assert torch.equal(value, among.tensors()[name]), name

    def test_embedding_together_gives_the_same_within_summation(self, backbone):
        prompts = ["a", None, "a long prompt"]
        apart, together = backbone.encode_prompts(prompts), backbone.encode_prompts(prompts, together=True)
        for name, value in apart.tensors().items():
            torch.testing.assert_close(value, together.tensors()[name])

    def test_rows_of_a_condition_can_be_taken_apart_and_joined(self, backbone):
        whole = self.condition(backbone, ["a", "b"])
        back = Condition.cat([whole.select([1]), whole.select([0])])
        for name, value in whole.text.tensors().items():
            assert torch.equal(back.text.tensors()[name], value.flip(0)), name
        assert (back.sizes is None) == (whole.sizes is None)
        assert whole.sizes is None or torch.equal(back.sizes, whole.sizes.flip(0))

    def test_what_pictures_are_told_is_what_training_calls_the_same(self, backbone):
        told = backbone.prepare([Prompt(text="a"), None], 64, 64).text.trimmed()
        expected = self.condition(backbone, ["a", None]).text.trimmed()
        for name, value in expected.tensors().items():
            assert torch.equal(told.tensors()[name], value), name

    def test_a_prompt_with_more_than_words_is_refused(self, backbone):
        with pytest.raises(ConfigError, match="says more than words"):
            backbone.prepare([Prompt(text="a", label=(1.0,))], 64, 64)

    def test_denoising_a_batch_equals_denoising_its_rows(self, backbone):
        x_t, t = torch.randn(2, *backbone.latent_shape(64, 64)), torch.tensor([3, 900])
        condition = self.condition(backbone, ["a", "b"])
        batch = backbone.denoise(x_t, t, condition)
        rows = [backbone.denoise(x_t[i : i + 1], t[i : i + 1], condition.select([i])) for i in range(2)]
        torch.testing.assert_close(batch, torch.cat(rows), atol=1e-5, rtol=1e-5)


class UnetContract(BackboneContract):
    """Backbones of diffusion in discrete time."""

    @pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
    def test_every_sampler_keeps_the_models_own_noise_schedule(self, backbone, name):
        scheduler = backbone.sampling_scheduler(name)
        torch.testing.assert_close(scheduler.alphas_cumprod, backbone.process.alphas_cumprod)
        assert scheduler.config.prediction_type == backbone.process.prediction

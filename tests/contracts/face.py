"""What every face embedder must do; each kind's own test inherits this."""

import pytest
import torch


class FaceContract:
    """Subclasses provide `embedder`, and pictures: `person` with the `box` of its face, and `nobody`."""

    def test_a_face_is_found_and_described(self, embedder, person, box):
        face = embedder.find(person, box)
        assert face.embedding.shape == (embedder.size,)
        assert face.embedding.dtype == torch.float32
        assert face.embedding.device.type == "cpu"
        left, top, right, bottom = face.box
        assert 0 <= left < right <= person.width
        assert 0 <= top < bottom <= person.height

    def test_the_same_picture_has_the_same_face(self, embedder, person):
        assert torch.equal(embedder.find(person).embedding, embedder.find(person).embedding)

    def test_where_there_is_no_face_there_is_none(self, embedder, nobody):
        assert embedder.find(nobody) is None

    def test_the_picture_is_not_changed(self, embedder, person, box):
        before = person.tobytes()
        embedder.find(person, box)
        assert person.tobytes() == before

    def test_weights_that_are_missing_are_an_error_that_names_the_folder(self, config, tmp_path):
        from trainers.errors import ModelError

        with pytest.raises(ModelError, match=str(tmp_path / "models" / "nothing")):
            config.model_copy(update={"path": tmp_path / "models" / "nothing"}).check()

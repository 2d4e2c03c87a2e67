"""A method joins a trunk without changing what it computes: walks every method that takes over a top-k trunk's weights,
and holds the loss of its first step, ahead of any update, against the baseline's."""

import math

from ablations.comparison.options import Options
from corpus.prepare import CorpusConfig
from lm.options import ModelOptions
from staged_training.staging import StagingConfig
from tests.ablations.fork_shocks import fork_shocks

# Nats.
BOUND = 0.001
# What a method is about cannot be there and leave the trunk's function as it is: another number of experts, another
# window, or what the docstring of its file says.
CHANGES_THE_FUNCTION = {
    "fewer_experts": 0.02,
    "random_k": 0.005,
    "relu": 0.004,
    "relu_penalty": 0.004,
    "relative_threshold": 0.004,
    "skipping": 0.004,
    "wider_window": 0.02,
}


def test_methods_join_a_trunk_without_changing_its_function(tmp_path, text_folder, tiny_model):
    options = Options(
        seeds=1,
        out=tmp_path,
        model=ModelOptions(**tiny_model | {"n_layers": 2, "d_model": 32, "n_experts": 16, "k": 4, "n_kv_heads": 2}),
        staging=StagingConfig(tokens=50 * 4 * 64, trunk_share=0.9, batch_size=4, seq_len=64, calibration_tokens=1024),
        corpus=CorpusConfig(data=(str(text_folder),), vocab_size=300),
    )
    baseline, *shocks = fork_shocks(options, n_batches=3)
    # A trunk that has learnt nothing keeps whatever joins it.
    assert baseline.nats < 0.5 * math.log(300)
    assert CHANGES_THE_FUNCTION.keys() <= {shock.method for shock in shocks}
    beyond = [shock for shock in shocks if abs(shock.nats) > CHANGES_THE_FUNCTION.get(shock.method, BOUND)]
    assert beyond == []

"""Plain LongLive streaming: the same step as Stream-T1 with one candidate, and nothing kept in the sinks."""

from ml_collections import ConfigDict

from configs import stream_t1


def get_config() -> ConfigDict:
    config = stream_t1.get_config()
    config.update_from_flattened_dict(
        {
            "search.beams": 1,
            "search.candidates_per_beam": 1,
            "search.noise_propagation": False,
            "search.sinking": False,
        }
    )
    return config

"""Settings: file, then environment, then flags; nothing unknown is accepted."""

from __future__ import annotations

import pytest
from wearfleet_cloud.config import load_settings
from wearfleet_protos.errors import ConfigError


def test_a_flag_wins_over_the_environment_which_wins_over_the_file(tmp_path, monkeypatch):
    file = tmp_path / "wearfleet.toml"
    file.write_text("[service]\nport = 1\nenrol_port = 2\nweb_port = 3\n")
    monkeypatch.setenv("WEARFLEET__SERVICE__ENROL_PORT", "20")
    monkeypatch.setenv("WEARFLEET__SERVICE__WEB_PORT", "30")
    service = load_settings(file, {"service": {"web_port": 300}}).service
    assert (service.port, service.enrol_port, service.web_port) == (1, 20, 300)


def test_the_default_binds_to_loopback_and_stores_in_sqlite(tmp_path):
    settings = load_settings(None, {"service": {"state_dir": tmp_path}})
    assert settings.service.host == "127.0.0.1"
    assert settings.database.url == f"sqlite:///{tmp_path}/wearfleet.db"


def test_a_broker_url_makes_the_broker_external():
    settings = load_settings(None, {"broker": {"url": "mqtts://broker:8883"}})
    assert settings.broker.kind == "external"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[servise]\nport = 1\n", "servise"),
        ("[service]\nprot = 1\n", "prot"),
        ("[service]\nport = 70000\n", "port"),
        ("[service]\nport = \n", "settings cannot be read"),
        ("[service]\ntenant = 'No Such'\n", "tenant"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(tmp_path, text, names):
    file = tmp_path / "wearfleet.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=names):
        load_settings(file)


def test_an_unknown_environment_variable_of_ours_is_an_error(monkeypatch):
    monkeypatch.setenv("WEARFLEET__BROCKER__PORT", "1")
    with pytest.raises(ConfigError, match="BROCKER"):
        load_settings()


def test_a_missing_settings_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_settings(tmp_path / "none.toml")

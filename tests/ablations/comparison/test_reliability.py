"""What a report may say of how far its comparison can be trusted."""

import dataclasses

from ablations.agreement.settings import LARGE, SETTINGS, SMALLER_MODEL
from ablations.agreement.table import SettingRow
from ablations.comparison import reliability
from ablations.comparison.records import read_records
from ablations.comparison.reliability import STUDY, form_of, reliability_statement
from ablations.report.table import footnotes
from foundation.environment import ROOT
from foundation.tables import read_rows
from staged_training.staging import StagingConfig


def test_the_statement_is_the_recorded_rows():
    (routing,) = (
        row
        for row in read_rows(STUDY / "settings.csv", SettingRow)
        if (row.setting, row.family) == (form_of(StagingConfig()), "routing")
    )
    sentence = reliability_statement(form_of(StagingConfig()))
    assert f"{routing.separable_agreeing} of the {routing.separable} pairs of routing arms" in sentence
    assert f"({routing.agreeing} of all {routing.pairs}), for {100 * routing.flops:.0f} % of their FLOPs" in sentence
    assert str(STUDY.relative_to(ROOT)) in sentence


def test_a_form_that_was_not_studied_is_said_so(monkeypatch, tmp_path):
    form = form_of(dataclasses.replace(StagingConfig(), trunk_share=0.33, freeze=0.5, anneal="merge"))
    assert form == "fork33_freeze50_merge"
    assert "(fork33_freeze50_merge) order methods as full runs do has not been measured" in reliability_statement(form)
    # Nor is any in a checkout without notes.
    monkeypatch.setattr(reliability, "STUDY", tmp_path)
    assert "has not been measured" in reliability_statement(form_of(StagingConfig()))


def test_the_studys_forks_are_named_as_comparisons_are():
    assert SETTINGS[form_of(StagingConfig())].freeze == StagingConfig().freeze
    for setting in LARGE:
        if setting != SMALLER_MODEL and not setting.small_rate:
            assert form_of(setting.staging(StagingConfig())) == setting.name


def test_the_report_says_it(write_synthetic):
    records = read_records(write_synthetic())
    said = "order methods as full runs do"
    assert not any(said in note for note in footnotes(records))
    comparison = dataclasses.replace(records.comparison, form="fork1_freeze2_decay")
    assert any(said in note for note in footnotes(dataclasses.replace(records, comparison=comparison)))

"""The classes of faults, by name."""

from campaign import crashes, damages, machines, object_store, services, strangers, together
from campaign.cases import Library

CLASSES: dict[str, Library] = {
    "kill": crashes.kills,
    "torn": crashes.torn_writes,
    "power": crashes.power_failures,
    "signal": crashes.signals,
    "error-write": crashes.errors,
    "error-read": crashes.reading_errors,
    "error-list": crashes.listing_errors,
    "error-stat": crashes.stat_errors,
    "damage": damages.damages,
    "swap": damages.swaps,
    "progress": damages.progress,
    "stranger": strangers.strangers,
    "together": together.together,
    "clock": together.clocks,
    "s3": object_store.requests,
    "machines": machines.machines,
    "prefect": services.kills,
}

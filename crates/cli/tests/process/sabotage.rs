//! The negative controls: what would be lost is seen, by the guest, and by the engine where it looks.

use crate::support::demo;

/// Sabotage below the engine's checks: the guest moves, notices, and says so.
fn caught_by_the_guest(what: &str, lost: &[&str]) {
    let (exit, report) = demo(&["--break", what, "--memory", "256M", "--device-state", "16M"]);
    assert_eq!(exit, 1, "{report}");
    assert_eq!(report["outcome"], "completed", "{report}");
    assert_eq!(report["verified"], false);
    assert_eq!(report["caught_by"], "guest", "{report}");
    let count: u64 = lost.iter().map(|kind| report["lost"][kind].as_u64().unwrap()).sum();
    assert!(count > 0, "none of {lost:?} counted: {report}");
}

/// The same with the engine's own check on: it never comes to a commit, and the guest goes on at the source, whole.
fn caught_by_the_engine(what: &str) {
    let (exit, report) = demo(&["--break", what, "--strict", "--memory", "256M", "--device-state", "16M"]);
    assert_eq!(exit, 1, "{report}");
    assert_eq!(report["outcome"], "aborted", "{report}");
    assert_eq!(report["caught_by"], "engine", "{report}");
    for kind in ["pages", "dma_blocks", "interrupts"] {
        assert_eq!(report["lost"][kind], 0, "{report}");
    }
}

#[test]
fn a_dropped_dirty_bit_is_caught_by_the_guest() {
    caught_by_the_guest("dirty-log", &["pages"]);
}

#[test]
fn a_dropped_dirty_bit_is_caught_by_the_engine() {
    caught_by_the_engine("dirty-log");
}

#[test]
fn a_device_log_with_holes_is_caught_by_the_guest() {
    caught_by_the_guest("device-log", &["dma_blocks", "interrupts"]);
}

#[test]
fn a_device_log_with_holes_is_caught_by_the_engine() {
    caught_by_the_engine("device-log");
}

#[test]
fn an_altered_tail_of_device_state_is_caught_by_the_guest() {
    caught_by_the_guest("device-tail", &["dma_blocks"]);
}

#[test]
fn an_interrupt_not_connected_again_is_caught_by_the_guest() {
    caught_by_the_guest("interrupt", &["interrupts"]);
}

#[test]
fn a_stale_page_after_its_last_copy_is_caught_by_the_guest() {
    caught_by_the_guest("page-order", &["pages"]);
}

#[test]
fn a_stale_page_after_its_last_copy_is_caught_by_the_engine() {
    caught_by_the_engine("page-order");
}

#[test]
fn a_device_stopped_before_its_peer_is_caught_by_the_guest() {
    caught_by_the_guest("p2p-order", &["dma_blocks"]);
}

//! The tests, by name.

use std::process::ExitCode;

use crate::check::{Outcome, chain};
use crate::{edu, guest, kernel_device, migdev, mtty, pin, refused};

/// What a test needs of the kernel it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// The kernel's sample device is loaded.
    Mtty,
    /// The project's own test driver is loaded.
    Migdev,
    /// The kernel's own KVM works, nested, and the command is in the image.
    Kvm,
    /// iommufd, and with it the devices' own files.
    Cdev,
    /// QEMU's edu behind an emulated IOMMU.
    Edu,
    /// A kernel without them.
    NoCdev,
}

impl Need {
    /// What `word` of the kernel's command line stands for.
    pub(crate) fn named(word: &str) -> Option<Self> {
        Some(match word {
            "mtty" => Self::Mtty,
            "migdev" => Self::Migdev,
            "kvm" => Self::Kvm,
            "cdev" => Self::Cdev,
            "no-cdev" => Self::NoCdev,
            "edu" => Self::Edu,
            _ => return None,
        })
    }
}

/// One test.
#[derive(Debug)]
pub(crate) struct Test {
    pub(crate) name: &'static str,
    pub(crate) needs: &'static [Need],
    run: fn() -> Outcome,
}

const fn test(name: &'static str, needs: &'static [Need], run: fn() -> Outcome) -> Test {
    Test { name, needs, run }
}

/// All of them. Each runs in a process of its own, and leaves nothing behind.
pub(crate) const TESTS: &[Test] = &[
    test("mtty_describes_itself", &[Need::Mtty], mtty::info::describes_itself),
    test("mtty_raises_its_interrupt", &[Need::Mtty], mtty::info::raises_its_interrupt),
    test("mtty_takes_every_arc_and_refuses_the_others", &[Need::Mtty], mtty::arcs::every_arc),
    test("mtty_stays_where_a_failed_arc_left_it", &[Need::Mtty], mtty::arcs::failed_set),
    test("mtty_keeps_its_descriptor_inside_the_saving_group", &[Need::Mtty], mtty::arcs::one_descriptor),
    test("mtty_loses_its_session_to_a_reset", &[Need::Mtty], mtty::arcs::reset_ends_a_session),
    test("mtty_moves_its_contents", &[Need::Mtty], mtty::stream::contents_move),
    test("mtty_refuses_a_wrong_header", &[Need::Mtty], mtty::stream::wrong_header),
    test("mtty_refuses_another_number_of_ports", &[Need::Mtty], mtty::stream::other_ports),
    test("mtty_says_how_far_pre_copy_is", &[Need::Mtty], mtty::stream::precopy_info),
    test("mtty_has_a_dirty_log_in_name_only", &[Need::Mtty], mtty::dirty::log),
    test("type1_maps_and_tracks", &[Need::Mtty], mtty::dirty::type1),
    test("cdev_moves_its_contents", &[Need::Mtty, Need::Cdev], mtty::stream::contents_move_by_cdev),
    test("cdev_maps_through_iommufd", &[Need::Mtty, Need::Cdev], mtty::dirty::iommufd),
    test("a_stock_kernel_has_no_iommufd", &[Need::Mtty, Need::NoCdev], mtty::dirty::no_iommufd),
    test("kernel_device_contents_move", &[Need::Mtty], kernel_device::contents_move),
    test("kernel_device_every_path", &[Need::Mtty], kernel_device::every_path),
    test("kernel_device_handed_over", &[Need::Mtty], kernel_device::handed_over),
    test("kernel_device_describes_itself", &[Need::Mtty], kernel_device::describes_itself),
    test("kernel_device_chooses_its_tracker", &[Need::Mtty], kernel_device::chooses_its_tracker),
    test("kernel_device_reset_ends_a_session", &[Need::Mtty], kernel_device::reset_ends_a_session),
    test("kernel_device_refusals_end_in_a_reset", &[Need::Mtty], kernel_device::refusals_end_in_a_reset),
    test("kernel_device_refusals_to_open", &[Need::Mtty], kernel_device::refusals_to_open),
    test("kernel_device_interrupts", &[Need::Mtty], kernel_device::interrupts),
    test("kernel_device_handed_over_bound", &[Need::Mtty, Need::Cdev], kernel_device::handed_over_bound),
    test("kernel_device_maps_other_memory", &[Need::Mtty], kernel_device::maps_other_memory),
    test("edu_does_not_migrate", &[Need::Edu], edu::does_not_migrate),
    test("migdev_describes_itself", &[Need::Migdev], migdev::dma::describes_itself),
    test("migdev_writes_and_logs_exactly", &[Need::Migdev], migdev::dma::exact),
    test("migdev_writes_and_logs_exactly_by_cdev", &[Need::Migdev, Need::Cdev], migdev::dma::exact_by_cdev),
    test("migdev_log_that_omits_is_found_out", &[Need::Migdev, Need::Cdev], migdev::dma::omitted),
    test("migdev_raises_its_interrupts", &[Need::Migdev], migdev::dma::interrupts),
    test("migdev_stands_still", &[Need::Migdev], migdev::dma::stands_still),
    test("migdev_stops_at_a_bad_descriptor", &[Need::Migdev], migdev::dma::ring_error),
    test("migdev_takes_every_arc_of_every_set_of_flags", &[Need::Migdev], migdev::arcs::every_arc),
    test("migdev_moves_while_it_changes", &[Need::Migdev], migdev::stream::contents_move),
    test("migdev_saves_64_mib_twice_the_same", &[Need::Migdev], migdev::stream::large),
    test("migdev_refuses_a_newer_version", &[Need::Migdev], migdev::stream::versions),
    test("migdev_finds_damage_in_a_stream", &[Need::Migdev], migdev::stream::damage),
    test("migdev_fault_fail_arc", &[Need::Migdev], migdev::faults::fail_arc),
    test("migdev_fault_error_arc", &[Need::Migdev], migdev::faults::error_arc),
    test("migdev_fault_short_read", &[Need::Migdev], migdev::faults::short_read),
    test("migdev_fault_enodev", &[Need::Migdev], migdev::faults::enodev),
    test("migdev_fault_wrong_size", &[Need::Migdev], migdev::faults::wrong_size),
    test("migdev_fault_precopy_zero", &[Need::Migdev], migdev::faults::precopy_zero),
    test("migdev_fault_accept_truncated", &[Need::Migdev], migdev::faults::accept_truncated),
    test("migdev_fault_slow_arc", &[Need::Migdev], migdev::faults::slow),
    test("a_guest_with_migdev_moves_whole", &[Need::Migdev, Need::Kvm], guest::moves_whole),
    test("a_guest_with_migdev_notices_what_is_lost", &[Need::Migdev, Need::Kvm], guest::notices_what_is_lost),
    test("a_guest_with_mtty_moves_whole", &[Need::Mtty, Need::Kvm], pin::moves_whole),
    test("a_guest_with_mtty_notices_a_dead_pin", &[Need::Mtty, Need::Kvm], pin::notices_a_dead_pin),
    test("a_guest_with_vfio_pci_runs_and_does_not_move", &[Need::Edu, Need::Kvm], refused::vfio_pci),
    test(
        "a_guest_with_an_unlogged_device_moves_if_it_may",
        &[Need::Migdev, Need::Kvm, Need::Cdev],
        refused::all_dirty,
    ),
];

/// Runs one, in this process.
pub(crate) fn run(name: &str) -> ExitCode {
    let Some(test) = TESTS.iter().find(|test| test.name == name) else {
        eprintln!("there is no test {name}");
        return ExitCode::from(2);
    };
    match (test.run)() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

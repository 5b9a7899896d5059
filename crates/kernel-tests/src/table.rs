//! The tests, by name.

use std::process::ExitCode;

use crate::check::Outcome;
use crate::iommufd_mock::{table, tracker};
use crate::{
    described, device_file, edu, engine, guest, host_report, kernel_device, migdev, mtty, pair, pin, refused,
    shared_space, xhci,
};
use vfio_migration_types::error_chain;

/// A need of tests: something that the kernel has or lacks.
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
    /// iommufd's mock IOMMU: a kernel that was built for it (`cargo xtask kernel-test --iommufd-mock`).
    IommufdMock,
    /// A kernel without iommufd.
    NoCdev,
    /// The kernel's own netdevsim, whose devices have devlink.
    Devlink,
    /// A second machine at the other end of a network link. On such a machine nothing else is tested.
    Peer,
    /// No remapping of interrupts, and a function with several MSI vectors. On such a machine nothing else is tested.
    NoRemapping,
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
            "devlink" => Self::Devlink,
            "edu" => Self::Edu,
            "peer" => Self::Peer,
            "no-remapping" => Self::NoRemapping,
            "iommufd-mock" => Self::IommufdMock,
            _ => return None,
        })
    }
}

#[derive(Debug)]
pub(crate) struct KernelTest {
    pub(crate) name: &'static str,
    pub(crate) needs: &'static [Need],
    run: fn() -> Outcome,
}

const fn test(name: &'static str, needs: &'static [Need], run: fn() -> Outcome) -> KernelTest {
    KernelTest { name, needs, run }
}

/// What every machine has.
const BOTH: &[Need] = &[Need::Mtty, Need::Migdev];

/// All of them. Each runs in a process of its own, and leaves nothing behind.
pub(crate) const TESTS: &[KernelTest] = &[
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
    test("edu_type1_finds_every_page_dirty", &[Need::Edu], edu::container_finds_every_page_dirty),
    test("two_devices_of_one_group_share_an_address_space", &[Need::Edu], shared_space::of_one_group),
    test("device_file_contents_move", &[Need::Mtty], device_file::contents_move),
    test("device_file_of_another_type", &[Need::Mtty], device_file::another_type),
    test("device_file_of_a_device_in_use", &[Need::Mtty], device_file::in_use),
    test("device_file_of_migdev", &[Need::Migdev], device_file::migdev),
    test("device_file_of_edu_is_refused", &[Need::Edu], device_file::edu_is_refused),
    test("described_alike_open_and_not", BOTH, described::alike_open_and_not),
    test("described_alike_as_pci_functions", &[Need::Edu], described::alike_as_pci_functions),
    test("described_probed", &[Need::Migdev], described::probed),
    test("described_by_devlink", &[Need::Devlink], described::by_devlink),
    test("host_report_lists_what_is_there", BOTH, host_report::lists_what_is_there),
    test("host_report_asks_as_the_uapi_does", BOTH, host_report::asks_as_the_uapi_does),
    test("host_report_leaves_the_state_that_it_finds", BOTH, host_report::leaves_the_state_that_it_finds),
    test("host_report_leaves_alone_what_is_in_use", BOTH, host_report::leaves_alone_what_is_in_use),
    test("host_report_says_what_a_user_may_not_open", BOTH, host_report::says_what_a_user_may_not_open),
    test("host_report_says_how_to_bind", BOTH, host_report::says_how_to_bind),
    test(
        "host_report_says_why_vfio_pci_does_not_migrate",
        &[Need::Edu],
        host_report::says_why_vfio_pci_does_not_migrate,
    ),
    test(
        "host_report_doctor_misses_iommufd",
        &[Need::Mtty, Need::NoCdev],
        host_report::doctor_misses_iommufd,
    ),
    test(
        "host_report_doctor_finds_iommufd",
        &[Need::Mtty, Need::Cdev, Need::Kvm],
        host_report::doctor_finds_iommufd,
    ),
    test("migdev_describes_itself", &[Need::Migdev], migdev::dma::describes_itself),
    test("migdev_writes_and_logs_exactly", &[Need::Migdev], migdev::dma::exact),
    test("migdev_writes_and_logs_exactly_by_cdev", &[Need::Migdev, Need::Cdev], migdev::dma::exact_by_cdev),
    test("migdev_type1_logs_exactly", &[Need::Migdev], migdev::dma::exact_by_container),
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
    test("engine_moves_there_and_back", &[Need::Migdev], engine::moves::there_and_back),
    test("engine_lost_device_log_is_noticed", &[Need::Migdev], engine::moves::a_lost_log_is_noticed),
    test("engine_moves_two_devices_together", &[Need::Migdev], engine::moves::two_devices),
    test("engine_two_devices_one_by_one_are_noticed", &[Need::Migdev], engine::moves::two_devices_one_by_one),
    test("engine_refuses_two_devices_without_p2p", &[Need::Migdev], engine::moves::one_lacks_p2p),
    test("engine_checks_are_awake", &[Need::Migdev], engine::awake::checks),
    test("engine_silent_reset_is_noticed", &[Need::Migdev], engine::awake::silent_reset),
    test("engine_arc_fails_at_the_source", &[Need::Migdev], engine::arcs::source_fails),
    test("engine_arc_errs_at_the_source", &[Need::Migdev], engine::arcs::source_errs),
    test("engine_arc_fails_on_the_way_back", &[Need::Migdev], engine::arcs::way_back_fails),
    test(
        "engine_arc_fails_on_the_way_back_and_holds",
        &[Need::Migdev],
        engine::arcs::way_back_fails_and_holds,
    ),
    test("engine_arc_fails_after_the_commit", &[Need::Migdev], engine::arcs::clean_up_fails),
    test("engine_arc_fails_at_the_destination", &[Need::Migdev], engine::arcs::destination_fails),
    test("engine_arc_fails_as_the_guest_starts", &[Need::Migdev], engine::arcs::start_fails),
    test("engine_short_reads", &[Need::Migdev], engine::faults::short_read),
    test("engine_zero_for_nothing_now", &[Need::Migdev], engine::faults::precopy_zero),
    test("engine_wrong_size_estimates", &[Need::Migdev], engine::faults::wrong_size),
    test("engine_session_lost_at_the_source", &[Need::Migdev], engine::faults::enodev_at_the_source),
    test(
        "engine_session_lost_at_the_destination",
        &[Need::Migdev],
        engine::faults::enodev_at_the_destination,
    ),
    test("engine_slow_arcs", &[Need::Migdev], engine::faults::slow),
    test("engine_arcs_slower_than_the_limit", &[Need::Migdev], engine::faults::too_slow),
    test("engine_log_that_omits_is_found_out", &[Need::Migdev, Need::Cdev], engine::faults::log_omits),
    test("engine_log_that_omits_unseen", &[Need::Migdev, Need::Cdev], engine::faults::log_omits_unseen),
    test("engine_log_that_is_refused", &[Need::Migdev, Need::Cdev], engine::faults::log_refused),
    test("engine_log_that_ends", &[Need::Migdev, Need::Cdev], engine::faults::log_lost),
    test("engine_newer_state_is_refused", &[Need::Migdev], engine::faults::newer_version),
    test("engine_truncated_state_is_refused", &[Need::Migdev], engine::faults::truncated),
    test("engine_reset_by_the_guest", &[Need::Migdev], engine::resets::by_the_guest),
    test("engine_reset_at_the_switchover", &[Need::Migdev], engine::resets::at_the_switchover),
    test(
        "engine_reset_by_the_guest_without_pre_copy",
        &[Need::Migdev],
        engine::resets::by_the_guest_without_pre_copy,
    ),
    test("engine_reset_at_the_destination", &[Need::Migdev], engine::resets::at_the_destination),
    test("engine_unlogged_device_needs_leave", &[Need::Migdev, Need::NoCdev], engine::unlogged::needs_leave),
    test("engine_adopted_device_keeps_its_mappings", &[Need::Migdev], engine::adopted::keeps_its_mappings),
    test(
        "engine_moves_adopted_devices_of_one_address_space",
        &[Need::Migdev],
        engine::adopted::two_devices_of_one_address_space,
    ),
    test("engine_moves_mtty", &[Need::Mtty], engine::serial::moves),
    test("engine_refuses_a_wrong_header_of_mtty", &[Need::Mtty], engine::serial::wrong_header),
    test("engine_refuses_altered_state_of_mtty", &[Need::Mtty], engine::serial::altered),
    test("engine_altered_state_of_mtty_unseen", &[Need::Mtty], engine::serial::altered_unseen),
    test("engine_refuses_truncated_state_of_mtty", &[Need::Mtty], engine::serial::truncated),
    test("engine_refuses_another_number_of_ports", &[Need::Mtty], engine::serial::other_ports),
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
    test(
        "a_guest_is_refused_where_its_vectors_do_not_fit",
        &[Need::Migdev, Need::Kvm],
        refused::fewer_vectors,
    ),
    test("msi_of_which_the_host_has_fewer", &[Need::NoRemapping], xhci::fewer_vectors),
    test("two_machines_guest_moves_whole", &[Need::Peer, Need::Migdev, Need::Kvm], pair::moves_whole),
    test(
        "two_machines_guest_notices_what_is_lost",
        &[Need::Peer, Need::Migdev, Need::Kvm],
        pair::notices_what_is_lost,
    ),
    test("mock_iommu_says_whether_it_tracks", &[Need::IommufdMock], table::capability),
    test("mock_iommu_tracks_exactly", &[Need::IommufdMock], table::exact),
    test("mock_iommu_reports_any_range_in_any_size", &[Need::IommufdMock], table::ranges_and_sizes),
    test("mock_iommu_stops_at_a_hole", &[Need::IommufdMock], table::holes),
    test("mock_iommu_forgets_what_it_unmaps", &[Need::IommufdMock], table::what_loses_bits),
    test("mock_iommu_with_huge_pages", &[Need::IommufdMock], table::huge_pages),
    test("iommu_tracker_is_exact", &[Need::IommufdMock], tracker::exact),
    test("iommu_tracker_of_every_size", &[Need::IommufdMock], tracker::sizes),
    test("iommu_tracker_starts_once", &[Need::IommufdMock], tracker::starts),
    test("iommu_tracker_and_memory_that_moves", &[Need::IommufdMock], tracker::memory_that_moves),
    test("iommu_tracker_needs_the_capability", &[Need::IommufdMock], tracker::without_capability),
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
            eprintln!("{}", error_chain(&*error));
            ExitCode::FAILURE
        }
    }
}

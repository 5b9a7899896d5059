//! The two pages through which the VMM and the guest program talk.

use crate::error::GuestImageError;
use crate::map::{Areas, DEVICES_MAX, REPORT, RamPart};

/// First word of the boot page: `BOOTINFO` in ASCII.
pub const BOOT_MAGIC: u64 = 0x4f46_4e49_544f_4f42;
/// First word of the report page, once the program runs: `GUREPORT` in ASCII.
pub const REPORT_MAGIC: u64 = 0x5452_4f50_4552_5547;
/// Index of the report's word by which the VMM asks for something.
pub const REQUEST_WORD: u64 = 21;
/// Index of the report's word that holds the longest gap.
pub const GAP_WORD: u64 = 14;

/// Guest physical address of that word: writing 1 to it asks the program to forget the longest gap, and it has when
/// [`Report::request`] is `false` again. That write to guest RAM is the VMM's own, for its write log.
pub const REQUEST: u64 = REPORT + REQUEST_WORD * 8;
/// Bytes of the report, from [`REPORT`] on.
pub const REPORT_LEN: usize = REPORT_WORDS * 8;

const REPORT_WORDS: usize = 27;
/// The longest block that the program takes: a slot is a page.
const BLOCK_MAX: u64 = 4096;

/// Boot parameters that the VMM gives the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootInfo {
    /// Pages that the writer numbers per second.
    pub pages_per_second: u64,
    /// The pages it may write.
    pub areas: Areas,
    /// Sample devices on the PCI bus; the program fails if it finds another number.
    pub devices: u64,
    /// Bytes per DMA block: a multiple of 64, 128 to 4096.
    pub block_len: u64,
    /// Descriptors kept in flight per device, 1 to 48.
    pub in_flight: u64,
    /// Whether every second block of a device goes to the mailbox of the next.
    pub p2p: bool,
    /// Microseconds between the program's timer interrupts.
    pub tick_us: u64,
}

impl BootInfo {
    /// The usual program for `ram`: blocks of 512 bytes, 16 in flight, a tick each millisecond.
    ///
    /// # Errors
    /// The RAM is not laid out as the program needs it.
    pub fn new(
        ram: &[RamPart],
        bytes_per_second: u64,
        devices: u64,
        p2p: bool,
    ) -> Result<Self, GuestImageError> {
        Ok(Self {
            pages_per_second: bytes_per_second / 4096,
            areas: Areas::of(ram, devices)?,
            devices,
            block_len: 512,
            in_flight: 16,
            p2p,
            tick_us: 1000,
        })
    }

    /// The bytes of the boot page, at [`BOOT_INFO`](crate::map::BOOT_INFO).
    ///
    /// # Errors
    /// A number is out of range.
    pub fn to_bytes(&self) -> Result<Vec<u8>, GuestImageError> {
        self.check()?;
        let words = [
            BOOT_MAGIC,
            self.pages_per_second,
            self.areas.low_start,
            self.areas.low_pages,
            self.areas.high_start,
            self.areas.high_pages,
            self.devices,
            self.block_len,
            self.in_flight,
            u64::from(self.p2p),
            self.tick_us,
            self.areas.stamps,
        ];
        Ok(words.into_iter().flat_map(u64::to_le_bytes).collect())
    }

    fn check(&self) -> Result<(), GuestImageError> {
        if self.devices > DEVICES_MAX {
            return Err(GuestImageError::TooManyDevices(self.devices));
        }
        let refuse = |what, value, takes| Err(GuestImageError::OutOfRange { what, value, takes });
        if !self.block_len.is_multiple_of(64) || !(128..=BLOCK_MAX).contains(&self.block_len) {
            return refuse("blocks", self.block_len, "multiples of 64 bytes, from 128 to 4096");
        }
        if !(1..=48).contains(&self.in_flight) {
            return refuse("a number of descriptors in flight", self.in_flight, "1 to 48");
        }
        if !(100..=1_000_000).contains(&self.tick_us) {
            return refuse("a tick in microseconds", self.tick_us, "100 to 1000000");
        }
        if self.pages_per_second > 10_000_000 {
            return refuse("a rate of pages per second", self.pages_per_second, "up to 10000000");
        }
        Ok(())
    }
}

/// Stage of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// The page is empty: the program has not begun.
    Off,
    /// The program boots and looks for its devices.
    Booting,
    /// The program's driver is ready.
    DriverReady,
    /// The program works and checks.
    Running,
    /// The program gave up.
    Failed,
    /// Something else stands there.
    Unknown(u64),
}

/// The program's report of itself. All counts are since its boot, moves included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Stage of the program.
    pub stage: Stage,
    /// Turns of its main loop.
    pub loops: u64,
    /// Pages that the guest wrote its number into.
    pub pages_written: u64,
    /// Pages compared with the number written last.
    pub pages_checked: u64,
    /// Pages found wrong. A wrong page counts once until it is written again.
    pub pages_lost: u64,
    /// Full walks over all pages.
    pub page_passes: u64,
    /// DMA blocks taken from the devices.
    pub dma_blocks: u64,
    /// DMA blocks compared, old ones again and again.
    pub blocks_checked: u64,
    /// DMA blocks found wrong. A wrong block counts once.
    pub blocks_lost: u64,
    /// Full walks over all slots of blocks.
    pub block_passes: u64,
    /// Device interrupts that announced something.
    pub interrupts: u64,
    /// Completed blocks whose interrupt did not come within a second of running.
    pub interrupts_lost: u64,
    /// Device interrupts that announced nothing.
    pub spurious: u64,
    /// The longest time between two of its looks at the host's clock, in nanoseconds.
    pub longest_gap_ns: u64,
    /// The host's clock at the last look, in nanoseconds.
    pub last_clock_ns: u64,
    /// Failure code with which the program gave up: see the assembler source.
    pub failure_code: u64,
    /// Detail of the failure: its meaning depends on the code.
    pub failure_detail: u64,
    /// Timer interrupts that the guest handled.
    pub ticks: u64,
    /// DMA blocks of peers' mailboxes among [`dma_blocks`](Self::dma_blocks).
    pub p2p_blocks: u64,
    /// Blocks in which a device said that its internal state is damaged; in [`blocks_lost`](Self::blocks_lost) too.
    pub integrity_failures: u64,
    /// Whether a request of the VMM is still open.
    pub request: u64,
    /// Bytes that came back from the serial card.
    pub serial_bytes: u64,
    /// Bytes of the serial card found wrong, missing, or too many.
    pub serial_bytes_lost: u64,
    /// Interrupts of the serial card's pin that announced bytes.
    pub serial_interrupts: u64,
    /// Seconds of running in which the serial card had bytes to announce, and its pin none of them.
    pub serial_interrupts_lost: u64,
    /// Blocks posted to the device that got fewest.
    pub least_posted: u64,
}

impl Report {
    /// What stands in the report page, from [`REPORT`] on. The counts of a running guest need not be of one instant.
    pub fn parse(bytes: &[u8; REPORT_LEN]) -> Self {
        let mut words = [0; REPORT_WORDS];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut whole = [0; 8];
            whole.copy_from_slice(chunk);
            *word = u64::from_le_bytes(whole);
        }
        let stage = match (words[0], words[1]) {
            (0, 0) => Stage::Off,
            (REPORT_MAGIC, 1) => Stage::Booting,
            (REPORT_MAGIC, 2) => Stage::DriverReady,
            (REPORT_MAGIC, 3) => Stage::Running,
            (REPORT_MAGIC, 0xDEAD) => Stage::Failed,
            (_, other) => Stage::Unknown(other),
        };
        Self {
            stage,
            loops: words[2],
            pages_written: words[3],
            pages_checked: words[4],
            pages_lost: words[5],
            page_passes: words[6],
            dma_blocks: words[7],
            blocks_checked: words[8],
            blocks_lost: words[9],
            block_passes: words[10],
            interrupts: words[11],
            interrupts_lost: words[12],
            spurious: words[13],
            longest_gap_ns: words[14],
            last_clock_ns: words[15],
            failure_code: words[16],
            failure_detail: words[17],
            ticks: words[18],
            p2p_blocks: words[19],
            integrity_failures: words[20],
            request: words[21],
            serial_bytes: words[22],
            serial_bytes_lost: words[23],
            serial_interrupts: words[24],
            serial_interrupts_lost: words[25],
            least_posted: words[26],
        }
    }

    /// Everything lost, of all kinds.
    pub fn lost(&self) -> u64 {
        let serial = self.serial_bytes_lost + self.serial_interrupts_lost;
        self.pages_lost + self.blocks_lost + self.interrupts_lost + serial
    }
}

//! A serial line, as much of a 16550 as a program needs that only prints.

use std::sync::{Mutex, PoisonError};

use vfio_migration::Section;

use crate::error::VmmError;
use crate::section::SectionReader;

/// First port of the first serial line.
pub const COM1: u16 = 0x3F8;
/// Name of the section that carries the registers.
pub const SECTION: &str = "platform.serial";
/// Layout of the section: the eight bytes of `Registers`.
pub const SECTION_VERSION: u32 = 1;

/// Lines longer than this are cut: the text comes from the guest.
const LINE_LIMIT: usize = 512;
/// Lines kept for [`Serial::lines`]; older ones are dropped.
const LINES_KEPT: usize = 256;

/// Line status: the transmitter is empty and ready (16550 data sheet, LSR bits 5 and 6).
const LSR_IDLE: u8 = 0x60;
/// LCR bit 7: the first two registers are the divisor.
const LCR_DLAB: u8 = 0x80;

/// The first serial line. Nothing can be received on it and it never interrupts.
#[derive(Debug, Default)]
pub struct Serial(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    registers: Registers,
    line: Vec<u8>,
    lines: std::collections::VecDeque<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Registers {
    divisor: [u8; 2],
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
}

impl Serial {
    /// Whether `port` is one of the eight of the line.
    pub fn claims(port: u16) -> bool {
        (COM1..COM1 + 8).contains(&port)
    }

    /// An `in` from `port`.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0);
        let state = self.lock();
        let registers = &state.registers;
        let divisor = registers.line_control & LCR_DLAB != 0;
        let value = match (port.wrapping_sub(COM1), divisor) {
            (0, true) => registers.divisor[0],
            (1, true) => registers.divisor[1],
            (1, false) => registers.interrupt_enable,
            // Interrupt identification: none pending.
            (2, _) => 1,
            (3, _) => registers.line_control,
            (4, _) => registers.modem_control,
            (5, _) => LSR_IDLE,
            (7, _) => registers.scratch,
            _ => 0,
        };
        if let Some(first) = data.first_mut() {
            *first = value;
        }
    }

    /// An `out` to `port`.
    pub fn write(&self, port: u16, data: &[u8]) {
        let Some(value) = data.first().copied() else { return };
        let mut state = self.lock();
        let divisor = state.registers.line_control & LCR_DLAB != 0;
        match (port.wrapping_sub(COM1), divisor) {
            (0, true) => state.registers.divisor[0] = value,
            (1, true) => state.registers.divisor[1] = value,
            (0, false) => state.transmit(value),
            (1, false) => state.registers.interrupt_enable = value,
            (3, _) => state.registers.line_control = value,
            (4, _) => state.registers.modem_control = value,
            (7, _) => state.registers.scratch = value,
            _ => {}
        }
    }

    /// The last lines that the guest printed in this process, oldest first.
    pub fn lines(&self) -> Vec<String> {
        self.lock().lines.iter().cloned().collect()
    }

    /// The registers. Text of a line that is not finished stays behind: it belongs to the console, not to the guest.
    pub fn save(&self) -> Section {
        let registers = self.lock().registers;
        let bytes = vec![
            registers.divisor[0],
            registers.divisor[1],
            registers.interrupt_enable,
            registers.line_control,
            registers.modem_control,
            registers.scratch,
            0,
            0,
        ];
        Section { name: SECTION.to_owned(), version: SECTION_VERSION, bytes }
    }

    /// Loads what [`save`](Self::save) gave.
    ///
    /// # Errors
    /// The section is of another version or length.
    pub fn load(&self, section: &Section) -> Result<(), VmmError> {
        let mut reader = SectionReader::open(section, SECTION_VERSION)?;
        let [low, high, interrupt_enable, line_control, modem_control, scratch, _, _] =
            reader.array::<8>()?;
        reader.end()?;
        let divisor = [low, high];
        self.lock().registers = Registers { divisor, interrupt_enable, line_control, modem_control, scratch };
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // The registers are plain bytes: a panic elsewhere cannot leave them half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn transmit(&mut self, byte: u8) {
        if byte != b'\n' {
            if self.line.len() < LINE_LIMIT {
                self.line.push(byte);
            }
            return;
        }
        let line = String::from_utf8_lossy(&self.line).trim_end().to_owned();
        self.line.clear();
        tracing::info!(target: "guest", "{line}");
        if self.lines.len() == LINES_KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_and_kept() {
        let serial = Serial::default();
        for byte in b"hello\r\nagain\n" {
            serial.write(COM1, &[*byte]);
        }
        assert_eq!(serial.lines(), ["hello", "again"]);
        for _ in 0..10_000 {
            serial.write(COM1, b"x");
        }
        serial.write(COM1, b"\n");
        assert_eq!(serial.lines().last().map(String::len), Some(LINE_LIMIT));
    }

    #[test]
    fn registers_travel() {
        let serial = Serial::default();
        serial.write(COM1 + 3, &[0x80]);
        serial.write(COM1, &[12]);
        serial.write(COM1 + 7, &[0x5A]);
        let other = Serial::default();
        other.load(&serial.save()).unwrap();
        let mut byte = [0];
        other.read(COM1, &mut byte);
        assert_eq!(byte, [12]);
        other.read(COM1 + 7, &mut byte);
        assert_eq!(byte, [0x5A]);
        let mut short = serial.save();
        short.bytes.pop();
        assert!(other.load(&short).is_err());
    }
}

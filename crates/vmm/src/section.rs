//! The one way in which the sections of machine state are written and read.
//!
//! Numbers are little-endian. A blob is a `u32` length and that many bytes; a structure of the KVM ABI is a blob of
//! exactly its size, so that a kernel whose structure has another size is refused instead of misread.

use vfio_migration::Section;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::VmmError;

/// Longest section that is loaded, in bytes. A vCPU takes about twelve kibibytes.
const SECTION_LIMIT: usize = 1 << 20;

/// Writes a section's bytes.
#[derive(Debug, Default)]
pub(crate) struct SectionWriter(Vec<u8>);

impl SectionWriter {
    pub(crate) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// A structure of the KVM ABI.
    pub(crate) fn abi<T: IntoBytes + Immutable>(&mut self, value: &T) {
        self.blob(value.as_bytes());
    }

    pub(crate) fn blob(&mut self, bytes: &[u8]) {
        // Nothing that is saved comes near 4 GiB; a longer blob would be cut and then refused on load.
        self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn finish(self, name: String, version: u32) -> Section {
        Section { name, version, bytes: self.0 }
    }
}

/// Reads a section's bytes; every error names the section.
#[derive(Debug)]
pub(crate) struct SectionReader<'a> {
    name: &'a str,
    rest: &'a [u8],
}

impl<'a> SectionReader<'a> {
    pub(crate) fn open(section: &'a Section, version: u32) -> Result<Self, VmmError> {
        let reader = Self { name: &section.name, rest: &section.bytes };
        if section.version != version {
            let found = section.version;
            return Err(reader.error(format!("it has version {found}, this VMM knows {version}")));
        }
        if section.bytes.len() > SECTION_LIMIT {
            return Err(
                reader.error(format!("it has {} bytes, at most {SECTION_LIMIT} are", section.bytes.len()))
            );
        }
        Ok(reader)
    }

    pub(crate) fn error(&self, reason: impl Into<String>) -> VmmError {
        VmmError::section(self.name, reason)
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], VmmError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or_else(|| self.error(format!("it ends {} bytes early", len - self.rest.len())))?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], VmmError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, VmmError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, VmmError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of things of at least `size` bytes each, which must all still fit in the section.
    pub(crate) fn count(&mut self, size: usize) -> Result<usize, VmmError> {
        let count = self.u32()? as usize;
        if count.checked_mul(size).is_none_or(|bytes| bytes > self.rest.len()) {
            return Err(self.error(format!("{count} entries do not fit in what it holds")));
        }
        Ok(count)
    }

    /// A structure of the KVM ABI.
    pub(crate) fn abi<T: FromBytes>(&mut self, what: &str) -> Result<T, VmmError> {
        let len = self.u32()? as usize;
        let size = size_of::<T>();
        if len != size {
            return Err(self.error(format!("`{what}` has {len} bytes, here it has {size}")));
        }
        let bytes = self.take(len)?;
        T::read_from_bytes(bytes).map_err(|_| self.error(format!("`{what}` has another size here")))
    }

    pub(crate) fn end(self) -> Result<(), VmmError> {
        match self.rest.len() {
            0 => Ok(()),
            more => Err(self.error(format!("it has {more} bytes too many"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section() -> Section {
        let mut writer = SectionWriter::default();
        writer.u32(1);
        writer.abi(&7u64);
        writer.finish("x".to_owned(), 3)
    }

    fn read(section: &Section) -> Result<(), VmmError> {
        let mut reader = SectionReader::open(section, 3)?;
        assert_eq!(reader.count(8)?, 1);
        assert_eq!(reader.abi::<u64>("seven")?, 7);
        reader.end()
    }

    #[test]
    fn only_the_whole_and_nothing_more_is_read() {
        read(&section()).unwrap();
        for len in 0..section().bytes.len() {
            let mut cut = section();
            cut.bytes.truncate(len);
            read(&cut).unwrap_err();
        }
        let mut longer = section();
        longer.bytes.push(0);
        read(&longer).unwrap_err();
        let mut newer = section();
        newer.version = 4;
        read(&newer).unwrap_err();
    }

    #[test]
    fn lengths_are_checked_before_they_are_used() {
        let mut writer = SectionWriter::default();
        writer.u32(u32::MAX);
        let section = writer.finish("x".to_owned(), 1);
        SectionReader::open(&section, 1).unwrap().count(1).unwrap_err();
        SectionReader::open(&section, 1).unwrap().abi::<u64>("x").unwrap_err();
    }
}

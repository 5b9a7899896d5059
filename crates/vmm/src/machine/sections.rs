//! The machine's state as sections: the processor's, and the fixed devices'.

use std::collections::BTreeMap;

use vfio_migration::Section;

use super::ReferenceMachine;
use crate::error::VmmError;
use crate::section::{SectionReader, SectionWriter};

/// The bus's own registers: the address register of config mechanism 1.
const BUS: (&str, u32) = ("bus", 1);

impl ReferenceMachine {
    pub(super) fn section_versions(&self) -> BTreeMap<String, u32> {
        let mut versions = self.processor.section_versions();
        for section in self.platform_sections() {
            versions.insert(section.name, section.version);
        }
        versions
    }

    pub(super) fn save_sections(&self) -> Result<Vec<Section>, VmmError> {
        let mut sections = self.processor.save()?;
        sections.extend(self.platform_sections());
        Ok(sections)
    }

    /// Loads all of them; one too many or too few is an error.
    pub(super) fn load_sections(&self, sections: &[Section]) -> Result<(), VmmError> {
        let known = self.section_versions();
        for (index, section) in sections.iter().enumerate() {
            if !known.contains_key(&section.name) {
                return Err(VmmError::section(&section.name, "this machine has no such state"));
            }
            if sections[..index].iter().any(|other| other.name == section.name) {
                return Err(VmmError::section(&section.name, "it came twice"));
            }
        }
        if let Some(missing) =
            known.keys().find(|name| !sections.iter().any(|section| section.name == **name))
        {
            return Err(VmmError::section(missing, "it did not come"));
        }
        self.processor.load(sections)?;
        let find = |name: &str| sections.iter().find(|section| section.name == name);
        let [bus, serial, clock] = self.platform_sections();
        if let Some(section) = find(&bus.name) {
            let mut reader = SectionReader::open(section, BUS.1)?;
            let address = reader.u32()?;
            reader.end()?;
            self.pci.set_config_address(address);
        }
        if let Some(section) = find(&serial.name) {
            self.platform.serial().load(section)?;
        }
        if let Some(section) = find(&clock.name) {
            self.platform.clock().load(section)?;
        }
        Ok(())
    }

    fn platform_sections(&self) -> [Section; 3] {
        let mut writer = SectionWriter::default();
        writer.u32(self.pci.config_address());
        let bus = writer.finish(BUS.0.to_owned(), BUS.1);
        [bus, self.platform.serial().save(), self.platform.clock().save()]
    }
}

//! Which names a CA may give, for whoever has another one from it.

use vfio_migration_types::quote;
use x509_parser::extensions::{GeneralName, GeneralSubtree};
use x509_parser::prelude::X509Certificate;

/// Most names of which an error tells.
const MOST_NAMED: usize = 8;

/// What names a CA may give, in words; `None`: any.
pub(crate) fn name_constraints(ca: &X509Certificate<'_>) -> Option<String> {
    let constraints = ca.name_constraints().ok().flatten()?.value;
    let listed = |word: &str, trees: Option<&Vec<GeneralSubtree<'_>>>| {
        let names: Vec<_> = trees?.iter().take(MOST_NAMED).map(|tree| constraint(&tree.base)).collect();
        Some(format!("{word} {}", names.join(", ")))
    };
    let all: Vec<_> = [
        listed("only", constraints.permitted_subtrees.as_ref()),
        listed("none in", constraints.excluded_subtrees.as_ref()),
    ]
    .into_iter()
    .flatten()
    .collect();
    (!all.is_empty()).then(|| all.join("; "))
}

fn constraint(base: &GeneralName<'_>) -> String {
    let octets = |bytes: &[u8]| bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(".");
    match base {
        GeneralName::DNSName(name) => format!("DNS {}", quote(name)),
        GeneralName::IPAddress(bytes) if bytes.len() == 8 => {
            let (address, mask) = bytes.split_at(4);
            format!("IP {}/{}", octets(address), octets(mask))
        }
        GeneralName::IPAddress(_) => "IP addresses of version 6".to_owned(),
        // The TLS library takes nobody then.
        GeneralName::DirectoryName(_) => {
            "directory names, which are not judged here: nobody is taken".to_owned()
        }
        GeneralName::URI(_) => "URIs, which are not judged here".to_owned(),
        _ => "names of a kind that is not judged here".to_owned(),
    }
}

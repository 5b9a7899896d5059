//! The man pages: what `--help` says, and what it has no room for.

use std::path::Path;

use clap::{Command, CommandFactory};
use clap_mangen::Man;

use crate::args::Cli;
use crate::exit::CliError;
use crate::schemas;
use crate::words::write_regular;

/// What the page of a verb says beyond its `--help`.
struct Extra {
    verb: &'static str,
    /// Command lines, and what each does.
    examples: &'static [(&'static str, &'static str)],
    /// Files that it reads, writes or makes, and what each is.
    files: &'static [(&'static str, &'static str)],
    /// Verbs whose pages are read next.
    see_also: &'static [&'static str],
}

const CONTROL: (&str, &str) = (
    "the socket of --control",
    "made by vfio-migrate-vm(1): for its user, root, and the groups of --control-group and --control-read-group",
);
const STATE: (&str, &str) =
    ("the folder of vm --state-dir", "the journal that says who owns the guest; it outlives the process");
const VFIO: (&str, &str) = ("/dev/vfio, /dev/iommu", "the kernel's VFIO devices");
const SYSFS: (&str, &str) =
    ("/sys/bus/pci, /sys/class/vfio-dev, /sys/bus/mdev", "what the kernel says of devices");

const PAGES: [Extra; 25] = [
    Extra {
        verb: "demo",
        examples: &[
            ("vfio-migrate demo", "a guest with one device moves, and checks itself"),
            ("vfio-migrate demo --break dirty-log", "the same with a fault that the guest must notice"),
        ],
        files: &[("/dev/kvm", "without it the software guest runs")],
        see_also: &["vm", "device", "migrate"],
    },
    Extra {
        verb: "device",
        examples: &[(
            "vfio-migrate device --socket /tmp/a.sock",
            "a device for vm --device vfio-user:/tmp/a.sock,id=dev0",
        )],
        files: &[("the socket of --socket", "made, and removed at the end")],
        see_also: &["vm", "describe"],
    },
    Extra {
        verb: "vm",
        examples: &[
            (
                "vfio-migrate vm --device vfio-user:/tmp/a.sock,id=dev0 --control /tmp/a.ctl --state-dir /var/lib/a --tls-creds /etc/vfio-migrate",
                "runs a guest, which can go to another host with these certificates",
            ),
            (
                "vfio-migrate vm --device vfio-user:/tmp/b.sock,id=dev0 --control /tmp/b.ctl --incoming tcp:0.0.0.0:7000 --tls-creds /etc/vfio-migrate",
                "waits for one",
            ),
            ("vfio-migrate vm --restore guest.img --control /tmp/a.ctl", "brings back what save wrote"),
            (
                "vfio-migrate vm --control /run/a.ctl --control-group libvirt --control-read-group monitor",
                "runs a guest that the members of one group steer, and those of another watch",
            ),
        ],
        files: &[
            CONTROL,
            STATE,
            ("the file of --expect", "TOML or JSON, as docs/schemas/expect.json describes it"),
            ("/dev/kvm", "without it the software guest runs"),
            VFIO,
        ],
        see_also: &["migrate", "status", "incoming", "save", "quit"],
    },
    Extra {
        verb: "migrate",
        examples: &[
            (
                "vfio-migrate migrate --control /tmp/a.ctl tcp:host-b:7000",
                "moves the guest, with the certificates of its vm, and waits for the end",
            ),
            (
                "vfio-migrate migrate --control /tmp/a.ctl --insecure-plaintext tcp:host-b:7000",
                "moves it in plain text, to a vm that was started with --insecure-plaintext too",
            ),
            (
                "vfio-migrate migrate --control /tmp/a.ctl --downtime-limit 100ms --give-up 10m tcp:host-b:7000",
                "moves it only if it is paused for no longer than that",
            ),
            (
                "vfio-migrate migrate --control /tmp/a.ctl --detach --json tcp:host-b:7000",
                "returns at once, for a program",
            ),
        ],
        files: &[CONTROL],
        see_also: &["check", "rehearse", "status", "set", "cancel", "continue", "incoming"],
    },
    Extra {
        verb: "rehearse",
        examples: &[(
            "vfio-migrate rehearse --control /tmp/a.ctl --to tcp:host-b:7000",
            "whether it would move, and how long the guest would be paused",
        )],
        files: &[CONTROL],
        see_also: &["check", "migrate"],
    },
    Extra {
        verb: "describe",
        examples: &[
            ("vfio-migrate describe vfio-user:/tmp/a.sock", "the manifest of a device server's device"),
            ("vfio-migrate describe --host -o host.json", "the manifest of this host"),
        ],
        files: &[SYSFS, VFIO],
        see_also: &["check", "devices", "explain"],
    },
    Extra {
        verb: "check",
        examples: &[
            (
                "vfio-migrate check vm:/tmp/a.ctl tcp:host-b:7000 --tls-creds /etc/vfio-migrate",
                "whether the guest of a vm can go to a receiver",
            ),
            (
                "vfio-migrate check guest.json host.json --policy site.toml",
                "the same of manifests, by a site's policy",
            ),
            ("vfio-migrate check --matrix hosts/", "which devices can go to which hosts of a pool"),
        ],
        files: &[("the file of --policy", "TOML or JSON, as docs/schemas/policy.json describes it")],
        see_also: &["describe", "explain", "rehearse"],
    },
    Extra {
        verb: "explain",
        examples: &[("vfio-migrate explain device-parameter", "what it means and who can change it")],
        files: &[],
        see_also: &["check", "rehearse"],
    },
    Extra {
        verb: "save",
        examples: &[
            (
                "vfio-migrate save --control /tmp/a.ctl -o guest.img --stop",
                "the guest lives in the file from then on",
            ),
            ("vfio-migrate save --device vfio-user:/tmp/a.sock -o device.img", "the state of one device"),
        ],
        files: &[CONTROL, ("the file of --output", "written beside it first, and renamed")],
        see_also: &["restore", "vm"],
    },
    Extra {
        verb: "restore",
        examples: &[(
            "vfio-migrate restore --device vfio-user:/tmp/b.sock device.img",
            "loads it into another device",
        )],
        files: &[],
        see_also: &["save", "vm"],
    },
    Extra {
        verb: "status",
        examples: &[
            ("vfio-migrate status --control /tmp/a.ctl", "how the guest and its migration stand"),
            ("vfio-migrate status --control /tmp/a.ctl --watch", "the same until the migration ends"),
        ],
        files: &[CONTROL],
        see_also: &["migrate", "vm"],
    },
    Extra {
        verb: "history",
        examples: &[(
            "vfio-migrate history --state-dir /var/lib/a",
            "what became of each migration, also when no process is left",
        )],
        files: &[STATE],
        see_also: &["status", "migrate"],
    },
    Extra {
        verb: "cancel",
        examples: &[("vfio-migrate cancel --control /tmp/a.ctl", "the guest goes on where it is")],
        files: &[CONTROL],
        see_also: &["migrate", "status"],
    },
    Extra {
        verb: "continue",
        examples: &[(
            "vfio-migrate continue --control /tmp/a.ctl",
            "ends the wait that migrate --pause-before-switchover asked for",
        )],
        files: &[CONTROL],
        see_also: &["migrate", "status"],
    },
    Extra {
        verb: "set",
        examples: &[(
            "vfio-migrate set --control /tmp/a.ctl --downtime-limit 1s",
            "lets a migration end that does not converge",
        )],
        files: &[CONTROL],
        see_also: &["migrate", "status"],
    },
    Extra {
        verb: "stop",
        examples: &[("vfio-migrate stop --control /tmp/a.ctl", "pauses the guest")],
        files: &[CONTROL],
        see_also: &["cont", "quit"],
    },
    Extra {
        verb: "cont",
        examples: &[("vfio-migrate cont --control /tmp/a.ctl", "lets it run again")],
        files: &[CONTROL],
        see_also: &["stop"],
    },
    Extra {
        verb: "quit",
        examples: &[("vfio-migrate quit --control /tmp/a.ctl", "ends a vm whose guest has left")],
        files: &[CONTROL],
        see_also: &["vm", "stop"],
    },
    Extra {
        verb: "incoming",
        examples: &[
            (
                "vfio-migrate incoming --control /tmp/a.ctl tcp:0.0.0.0:7000",
                "takes a guest in again, with the certificates that the vm was started with",
            ),
            (
                "vfio-migrate incoming --control /tmp/a.ctl --tls-creds /etc/vfio-migrate --expect /run/a.toml tcp:0.0.0.0:7000",
                "with these certificates, and from whom the file says alone",
            ),
        ],
        files: &[CONTROL],
        see_also: &["vm", "migrate"],
    },
    Extra {
        verb: "devices",
        examples: &[
            ("vfio-migrate devices", "what this host has, and why each can or cannot migrate"),
            ("vfio-migrate devices --probe 0000:01:00.0", "opens one, which resets it, and asks it"),
        ],
        files: &[SYSFS, VFIO],
        see_also: &["doctor", "describe"],
    },
    Extra {
        verb: "doctor",
        examples: &[(
            "vfio-migrate doctor --memory 16G",
            "whether such a guest could be locked into memory, too",
        )],
        files: &[SYSFS, VFIO, ("/boot, /lib/modules", "what the kernel was built with")],
        see_also: &["devices"],
    },
    Extra {
        verb: "completions",
        examples: &[
            (
                "vfio-migrate completions bash > ~/.local/share/bash-completion/completions/vfio-migrate",
                "for bash, from the next shell on",
            ),
            ("vfio-migrate completions zsh > ~/.zfunc/_vfio-migrate", "for zsh, if ~/.zfunc is in its fpath"),
            ("vfio-migrate completions fish > ~/.config/fish/completions/vfio-migrate.fish", "for fish"),
        ],
        files: &[],
        see_also: &["man"],
    },
    Extra {
        verb: "man",
        examples: &[(
            "vfio-migrate man ~/.local/share/man/man1",
            "man vfio-migrate-migrate finds them there",
        )],
        files: &[],
        see_also: &["completions"],
    },
    Extra {
        verb: "tls",
        examples: &[
            ("vfio-migrate tls init ca", "makes a private CA"),
            ("vfio-migrate tls host host-b --ca ca", "makes what host-b needs, in ./host-b"),
            ("vfio-migrate tls show /etc/vfio-migrate", "for whom and until when it is good"),
            ("vfio-migrate tls revoke host-b --ca ca", "takes back what it has made for host-b"),
        ],
        files: &[
            ("ca-cert.pem", "the CA that is trusted"),
            ("server-cert.pem, server-key.pem", "of a host at which guests arrive"),
            ("client-cert.pem, client-key.pem", "of a host which guests leave"),
            ("ca-crl.pem", "what the CA has revoked, where there is such a list"),
            ("ca-key.pem", "the CA's own key; it does not leave its host"),
            ("issued", "folder beside it: the certificates that it has made"),
        ],
        see_also: &["vm", "migrate"],
    },
    Extra {
        verb: "",
        examples: &[("vfio-migrate demo", "shows all of it on this host, and changes nothing")],
        files: &[CONTROL, STATE],
        see_also: &[],
    },
];

/// Writes every page into `dir`, which is made if it is not there.
pub(crate) fn write(dir: &Path) -> Result<(), CliError> {
    let failed = |error: std::io::Error| CliError::caused(&dir.display().to_string(), &error);
    std::fs::create_dir_all(dir).map_err(failed)?;
    for (name, page) in pages().map_err(failed)? {
        write_regular(&dir.join(name), &page)?;
    }
    Ok(())
}

/// Every page with the name of its file: the command's own, and one for each verb that is not hidden.
fn pages() -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let mut pages = vec![page(&command, "")?];
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        pages.push(page(verb, verb.get_name())?);
    }
    Ok(pages)
}

fn page(command: &Command, verb: &str) -> std::io::Result<(String, Vec<u8>)> {
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if verb.is_empty() {
        let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set());
        let lines = verbs.map(|verb| {
            let about = verb.get_about().map(ToString::to_string).unwrap_or_default();
            (format!("vfio-migrate-{}(1)", verb.get_name()), about)
        });
        section(&mut page, "VERBS", &tagged(lines));
    }
    let parts: Vec<&Command> =
        command.get_subcommands().filter(|part| !verb.is_empty() && !part.is_hide_set()).collect();
    if !parts.is_empty() {
        let lines = parts.into_iter().map(|part| {
            let usage = part.clone().render_usage().to_string();
            let about = part.get_about().map(ToString::to_string).unwrap_or_default();
            let options =
                part.get_arguments().filter(|option| option.get_long().is_some()).filter_map(|option| {
                    let help = option.get_help().filter(|_| {
                        !option.is_global_set() && option.get_id() != "help" && option.get_id() != "version"
                    })?;
                    Some(format!(" --{}: {help}.", option.get_long()?))
                });
            (
                usage.trim_start_matches("Usage: ").to_owned(),
                format!("{about}.{}", options.collect::<String>()),
            )
        });
        section(&mut page, "SUBCOMMANDS", &tagged(lines));
    }
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let (notes, exit) = help.split_once("Exit codes: ").unwrap_or((help.as_str(), ""));
    if !notes.trim().is_empty() {
        let paragraphs: Vec<String> = notes.trim().lines().map(line).collect();
        // A list that is aligned by spaces stays as it is.
        let (open, close) = if notes.contains("\n  ") { (".nf\n", "\n.fi") } else { ("", "") };
        let between = if open.is_empty() { "\n.PP\n" } else { "\n" };
        section(&mut page, "NOTES", &format!("{open}{}{close}", paragraphs.join(between)));
    }
    if !exit.is_empty() {
        section(&mut page, "EXIT STATUS", &line(exit.trim()));
    }
    let answers = schemas::of_verb(verb).map(|answer| {
        let when = if answer.when.is_empty() { "always" } else { answer.when };
        (format!("docs/schemas/{}.json", answer.schema), when.replace('`', ""))
    });
    let answers: Vec<_> = answers.collect();
    if !answers.is_empty() {
        let failure = (
            format!("docs/schemas/{}.json", schemas::FAILURE),
            "when it cannot do what it was asked for, its command line included".to_owned(),
        );
        let text = tagged(answers.into_iter().chain([failure]));
        section(&mut page, "JSON", &format!("Schemas of what --json prints:\n{text}"));
    }
    if let Some(extra) = PAGES.iter().find(|extra| extra.verb == verb) {
        let own = |(one, two): &(&str, &str)| ((*one).to_owned(), (*two).to_owned());
        section(&mut page, "EXAMPLES", &tagged(extra.examples.iter().map(own)));
        if !extra.files.is_empty() {
            section(&mut page, "FILES", &tagged(extra.files.iter().map(own)));
        }
        let verbs = extra.see_also.iter().map(|verb| format!("vfio-migrate-{verb}(1)"));
        let verbs: Vec<String> = match verb {
            "" => ["migrate", "vm", "demo"].iter().map(|verb| format!("vfio-migrate-{verb}(1)")).collect(),
            _ => std::iter::once("vfio-migrate(1)".to_owned()).chain(verbs).collect(),
        };
        section(&mut page, "SEE ALSO", &line(&verbs.join(", ")));
    }
    man.render_version_section(&mut page)?;
    Ok((man.get_filename(), page))
}

fn section(page: &mut Vec<u8>, title: &str, text: &str) {
    page.extend(format!(".SH {title}\n{text}\n").into_bytes());
}

/// Paragraphs with a heading each.
fn tagged(items: impl IntoIterator<Item = (String, String)>) -> String {
    let items = items.into_iter().map(|(tag, text)| format!(".TP\n{}\n{}", line(&tag), line(&text)));
    items.collect::<Vec<_>>().join("\n")
}

/// One line of text as roff has it: a dash that can be copied, no backslash and no request by accident.
fn line(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn every_verb_has_a_page_and_its_examples_are_command_lines() {
        let command = Cli::command();
        let verbs: Vec<&str> =
            command.get_subcommands().filter(|verb| !verb.is_hide_set()).map(Command::get_name).collect();
        for verb in &verbs {
            let extra = PAGES.iter().find(|extra| extra.verb == *verb).unwrap_or_else(|| panic!("{verb}"));
            assert!(!extra.examples.is_empty(), "{verb}");
            for other in extra.see_also {
                assert!(verbs.contains(other), "{verb} points to {other}");
            }
        }
        for (words, _) in PAGES.iter().flat_map(|extra| extra.examples) {
            let words = words.split(" > ").next().unwrap().split(' ');
            Cli::try_parse_from(words.clone()).unwrap_or_else(|error| panic!("{words:?}: {error}"));
        }
    }

    #[test]
    fn every_page_has_the_sections_that_people_look_for() {
        for (name, page) in pages().unwrap() {
            let page = String::from_utf8(page).unwrap();
            for section in ["NAME", "SYNOPSIS", "EXAMPLES", "SEE ALSO", "EXIT STATUS", "VERSION"] {
                assert!(page.contains(&format!(".SH {section}\n")), "{name} has no {section}");
            }
            // An option of its own, or of a verb below it.
            let json = page.contains("\\fB\\-\\-json\\fR") || page.contains("\\-\\-json: ");
            assert_eq!(page.contains(".SH JSON\n"), json, "{name}");
        }
    }
}

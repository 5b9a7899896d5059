# The guest program. Entered at its first byte in 64-bit mode at CPL 0, interrupts off, memory mapped one to one, a
# stack, a GDT with code at selector 0x08. Addresses are those of map.rs; all code is position independent.
#
# Registers that hold through the whole program: r13 boot page, r14 report page, r15 variables.
# Routines may use rax, rcx, rdx, rsi, rdi, r8 to r11; they keep rbx, rbp, r12.
#
# Failure codes (report word 16, port 0xC08), with the detail in word 17:
#   0x001 no boot page             0x002 no sample device where the VMM announced some (detail: found)
#   0x003 a BAR has no address     0x004 no MSI-X capability         0x005 the MSI-X table is not in BAR 0
#   0x006 not the expected device behind BAR 0 (detail: what it read)
#   0x007 a device completed more blocks than were posted (detail: device)
#   0x008 the device refuses the ring (detail: its STATUS)
#   0x009 a serial card without ports or without a pin (detail: its ports)
#   0x100+v exception v (detail: instruction pointer)                0x200 unexpected interrupt

.equ BOOT, 0x5000
.equ B_RATE, 8
.equ B_LOW_START, 16
.equ B_LOW_PAGES, 24
.equ B_HIGH_START, 32
.equ B_HIGH_PAGES, 40
.equ B_DEVICES, 48
.equ B_BLOCK_LEN, 56
.equ B_IN_FLIGHT, 64
.equ B_P2P, 72
.equ B_TICK_US, 80
.equ B_STAMPS, 88

.equ REPORT, 0x6000
.equ R_STAGE, 8
.equ R_LOOPS, 16
.equ R_PAGES_WRITTEN, 24
.equ R_PAGES_CHECKED, 32
.equ R_PAGES_LOST, 40
.equ R_PAGE_PASSES, 48
.equ R_DMA_BLOCKS, 56
.equ R_BLOCKS_CHECKED, 64
.equ R_BLOCKS_LOST, 72
.equ R_BLOCK_PASSES, 80
.equ R_INTERRUPTS, 88
.equ R_INTERRUPTS_LOST, 96
.equ R_SPURIOUS, 104
.equ R_GAP, 112
.equ R_CLOCK, 120
.equ R_FAILURE, 128
.equ R_DETAIL, 136
.equ R_TICKS, 144
.equ R_P2P_BLOCKS, 152
.equ R_INTEGRITY, 160
.equ R_REQUEST, 168
.equ R_UART_BYTES, 176
.equ R_UART_BYTES_LOST, 184
.equ R_UART_INTERRUPTS, 192
.equ R_UART_INTERRUPTS_LOST, 200
.equ R_LEAST_POSTED, 208   # by the device that posted fewest, looked at each tick

# Variables. The interrupt handlers reach them by absolute address.
.equ VARS, 0x20000
.equ V_DEVICES, 0
.equ V_TICKS, 8           # counted by the timer's handler
.equ V_TICKS_SEEN, 16
.equ V_WORK, 24           # set by a device's handler
.equ V_CLOCK, 32          # the host's clock at the last look
.equ V_OWED, 40           # pages to write, times 1e9
.equ V_STAMP, 48          # the last stamp given out
.equ V_WRITE_PAGE, 56
.equ V_WRITE_AT, 64
.equ V_WRITE_END, 72
.equ V_CHECK_PAGE, 80
.equ V_CHECK_AT, 88
.equ V_CHECK_END, 96
.equ V_RUN_CLOCK, 104     # nanoseconds in which the guest ran: gaps count for little
.equ V_PAGES, 112
.equ V_SLOT, 120          # the slot checker: device * 128 + flow * 64 + slot
.equ V_SOURCE_SUM, 128    # sum of the words of a source block, its first left out
.equ V_NEXT_LOOK, 136     # tick at which to look for lost interrupts
.equ V_CHECKS, 144        # pages to compare in this turn
.equ V_SLOT_CHECKS, 152   # and old blocks
.equ V_UART, 160          # the serial card's first port, 0 without a card
.equ V_UART_NEXT, 168     # tick of the next burst
.equ V_UART_OUT, 176      # bytes written to it
.equ V_UART_IN, 184       # of these, read or given up
.equ V_UART_HEARD, 192    # set by its handler
.equ V_UART_SINCE, 200    # run clock when it was last found set

# A device, 512 bytes.
.equ DEVS, 0x21000
.equ D_BAR0, 0
.equ D_MAILBOX, 8
.equ D_CONFIG, 16         # its address for port 0xCF8
.equ D_POSTED, 24
.equ D_MEMORY, 32         # its MiB of RAM
.equ D_INDEX, 40
.equ D_FLOWS, 64          # two flows of 128 bytes
.equ F_SEEN, 0            # completed blocks as the handler last read them
.equ F_HANDLED, 8         # of these, checked
.equ F_ISSUED, 16         # posted in this flow
.equ F_DONE, 24           # address of the device's count
.equ F_ACK, 32            # address of the acknowledge register
.equ F_WAITING, 40        # run clock when DONE was first found ahead of SEEN, 0 if it is not
.equ F_TARGET, 48         # address of slot 0
.equ F_SLOTS, 56          # address of the table of numbers
.equ F_SALT, 64           # for cookies
.equ F_HEARD, 72          # set by the handler: the device waits to be told that it may raise the vector again

.equ IDT, 0x30000
.equ CODE_SELECTOR, 8
.equ DEVICE_MEMORY, 0x200000
.equ DEVICES_MAX, 64       # 64 MiB of them, and the stamps behind those that there are

.equ LAPIC, 0xFEE00000
.equ LAPIC_TPR, 0x80
.equ LAPIC_EOI, 0xB0
.equ LAPIC_SPURIOUS, 0xF0
.equ LAPIC_IRR_DEVICES, 0x220   # of the first 32 of the devices' vectors: which of them wait
.equ LAPIC_LVT_TIMER, 0x320
.equ LAPIC_INITIAL, 0x380
.equ LAPIC_DIVIDE, 0x3E0
.equ DEVICE_VECTOR, 0x40  # to 0xBF, two per device
.equ TIMER_VECTOR, 0xE0   # above the devices': the processor takes the highest of those that wait, and takes few per second
                          # where KVM emulates it
.equ SPURIOUS_VECTOR, 0xFF

.equ IOAPIC, 0xFEC00000   # selects
.equ IOAPIC_DATA, 0x10
.equ IOAPIC_PINS, 24

.equ PCI_END, 0x80010000   # past the last config address of bus 0
.equ RING_SIZE, 64
.equ PAGES_PER_TURN, 1024 # written at most
.equ CHECK_SHIFT, 16      # a page is compared per 65.536 us of running, so that busy devices cannot starve the check
.equ CHECKS_LEAST, 16     # and never fewer than this per turn
.equ SLOT_SHIFT, 22       # an old block is compared per 4 ms of running, and two per turn
.equ BLOCKS_PER_TURN, 4   # new blocks per flow, so that a turn stays short
.equ LOST_AFTER, 1000000000
.equ GAP_COUNTS, 20000000 # a gap counts for so much of the run clock, and owes so many pages, at most

.section .rodata.vfio_migrate_guest, "a", @progbits
.balign 16
.globl vfio_migrate_guest_start
vfio_migrate_guest_start:
    cli
    cld
    mov r13d, BOOT
    mov r14d, REPORT
    mov r15d, VARS
    movabs rax, 0x54524f5045525547
    mov [r14], rax
    mov qword ptr [r14 + R_STAGE], 1
    movabs rax, 0x4f464e49544f4f42
    mov edi, 1
    xor esi, esi
    cmp [r13], rax
    jne vmg_fail
    lea rsi, [rip + vmg_text_boot]
    call vmg_print
    call vmg_build_idt
    call vmg_start_timer
    call vmg_find_devices
    call vmg_start_devices
    call vmg_start_uart
    mov qword ptr [r14 + R_STAGE], 2
    call vmg_start_areas
    lea rsi, [rip + vmg_text_ready]
    call vmg_print
    mov qword ptr [r14 + R_STAGE], 3
    mov qword ptr [r15 + V_WORK], 1
    sti

vmg_turn:
    inc qword ptr [r14 + R_LOOPS]
    cmp qword ptr [r15 + V_WORK], 0
    je 1f
    mov qword ptr [r15 + V_WORK], 0
    call vmg_serve_devices
1:  mov rax, [r15 + V_TICKS]
    cmp rax, [r15 + V_TICKS_SEEN]
    je 2f
    mov [r15 + V_TICKS_SEEN], rax
    mov [r14 + R_TICKS], rax
    call vmg_look_at_clock
    call vmg_look_for_lost
    call vmg_find_least
    call vmg_write_pages
    call vmg_check_pages
    call vmg_serve_uart
4:  call vmg_check_slot
    dec qword ptr [r15 + V_SLOT_CHECKS]
    jnz 4b
    jmp vmg_turn
2:  # Nothing to do, unless something came just now: STI takes effect after HLT.
    cli
    cmp qword ptr [r15 + V_WORK], 0
    jne 3f
    mov rax, [r15 + V_TICKS]
    cmp rax, [r15 + V_TICKS_SEEN]
    jne 3f
    sti
    hlt
    jmp vmg_turn
3:  sti
    jmp vmg_turn

package qemuio

import "context"

// command is one word of the language.
type command struct {
	name, alt   string
	args, short string
	long        string // more help, if any
	gap         bool   // qemu-io's line has a space more
	least, most int    // number of arguments; most is -1 for any
	noFile      bool   // needs no open image
	changes     bool   // is refused for an image opened read-only
	run         func(s *Shell, ctx context.Context, c command, words []string) error
}

// line is the command's help in one line.
func (c command) line() string {
	text := c.name
	if c.args != "" {
		text += " " + c.args
	}
	if c.gap {
		text += " "
	}
	return text + " -- " + c.short
}

// lookup finds a command by its name or its short name.
func lookup(word string) (command, bool) {
	for _, c := range commands() {
		if word == c.name || word == c.alt {
			return c, true
		}
	}
	return command{}, false
}

// commands are all there are, by name.
func commands() []command {
	return []command{
		{name: "abort", short: "simulate a program crash using abort(3)", noFile: true, run: runAbort},
		{name: "aio_flush", short: "completes all outstanding aio requests", run: runAIOFlush},
		{
			name: "aio_read", args: "[-Ciqv] [-P pattern] off len [len..]", short: "asynchronously reads a number of bytes",
			least: 2, most: -1, run: runAIORead, long: longAIORead,
		},
		{
			name: "aio_write", args: "[-Cfiquz] [-P pattern] off len [len..]", short: "asynchronously writes a number of bytes",
			least: 2, most: -1, changes: true, run: runAIOWrite, long: longAIOWrite,
		},
		{
			name: "alloc", alt: "a", args: "offset [count]", short: "checks if offset is allocated in the file",
			least: 1, most: 2, run: runAlloc,
		},
		{
			name: "break", args: "event tag", short: "sets a breakpoint on event and tags the stopped request as tag",
			least: 2, most: 2, run: runBreak,
		},
		{name: "close", alt: "c", short: "close the current open file", run: runClose},
		{
			name: "discard", alt: "d", args: "[-Cq] off len", short: "discards a number of bytes at a specified offset",
			least: 2, most: -1, changes: true, run: runDiscard, long: longDiscard,
		},
		{name: "flush", alt: "f", short: "flush all in-core file state to disk", run: runFlush},
		{
			name: "help", alt: "?", args: "[command]", short: "help for one or all commands",
			most: 1, noFile: true, run: runHelp,
		},
		{name: "info", alt: "i", short: "prints information about the current file", run: runInfo},
		{name: "length", alt: "l", short: "gets the length of the current file", run: runLength},
		{name: "map", gap: true, short: "prints the allocated areas of a file", run: runMap},
		{
			name: "open", alt: "o", args: "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
			short: "open the file specified by path", least: 1, most: -1, noFile: true, run: runOpen, long: longOpen,
		},
		{name: "quit", alt: "q", short: "exit the program", most: -1, noFile: true, run: runQuit},
		{
			name: "read", alt: "r", args: "[-abCqv] [-P pattern [-s off] [-l len]] off len",
			short: "reads a number of bytes at a specified offset", least: 2, most: -1, run: runRead, long: longRead,
		},
		{
			name: "readv", args: "[-Cqv] [-P pattern] off len [len..]", short: "reads a number of bytes at a specified offset",
			least: 2, most: -1, run: runReadv, long: longReadv,
		},
		{name: "remove_break", args: "tag", short: "remove a breakpoint by tag", least: 1, most: 1, run: runRemoveBreak},
		{
			name: "reopen", args: "[(-r|-w)] [-c cache] [-o options]", short: "reopens an image with new options",
			most: -1, run: runReopen, long: longReopen,
		},
		{name: "resume", args: "tag", short: "resumes the request tagged as tag", least: 1, most: 1, run: runResume},
		{
			name: "sigraise", args: "signal", short: "raises a signal", least: 1, most: 1, noFile: true, run: runSigraise,
			long: longSigraise,
		},
		{name: "sleep", short: "waits for the given value in milliseconds", least: 1, most: 1, noFile: true, run: runSleep},
		{
			name: "truncate", alt: "t", args: "[-m prealloc_mode] off", short: "truncates the current file at the given offset",
			least: 1, most: 3, changes: true, run: runTruncate,
		},
		{
			name: "wait_break", args: "tag", short: "waits for the suspension of a request",
			least: 1, most: 1, run: runWaitBreak,
		},
		{
			name: "write", alt: "w", args: "[-bcCfnquz] [-P pattern | -s source_file] off len",
			short: "writes a number of bytes at a specified offset", least: 2, most: -1, changes: true, run: runWrite, long: longWrite,
		},
		{
			name: "writev", args: "[-Cfq] [-P pattern] off len [len..]", short: "writes a number of bytes at a specified offset",
			least: 2, most: -1, changes: true, run: runWritev, long: longWritev,
		},
	}
}

// More help for the commands that need it.
const (
	longRead = `
 Reads len bytes from offset off of the open image.

 'read -v 512 1k' shows the kilobyte that begins after the first half of one.

 -P byte   the bytes must all be this one
 -s off    with -P: only those from off on, counted from the start of what is read
 -l len    with -P: only so many of them
 -v        show the bytes
 -b        read the VM state instead of the disk
 -C        tell sizes and times in fields between commas
 -q        tell nothing about sizes and times
 -p        means nothing any more`
	longReadv = `
 Reads from offset off as many bytes as all the lengths together.

 -P byte   the bytes must all be this one
 -v        show the bytes
 -C        tell sizes and times in fields between commas
 -q        tell nothing about sizes and times`
	longWrite = `
 Writes len bytes at offset off of the open image: 0xcd, unless said otherwise.

 'write -P 7 512 1k' writes a kilobyte of sevens after the first half of one.

 -P byte   what to write
 -s file   write what is in this file, again and again
 -z        write zeroes, as such
 -u        with -z: the image may give the space back
 -n        with -z: fail rather than be as slow as a write of data
 -c        store it compressed
 -b        write the VM state instead of the disk
 -f        the data is durable when the command ends
 -C        tell sizes and times in fields between commas
 -q        tell nothing about sizes and times
 -p        means nothing any more`
	longWritev = `
 Writes at offset off as many bytes as all the lengths together: 0xcd, unless said otherwise.

 -P byte   what to write
 -f        the data is durable when the command ends
 -C        tell sizes and times in fields between commas
 -q        tell nothing about sizes and times`
	longAIORead = `
 Begins to read from offset off as many bytes as all the lengths together, and goes on without waiting.
 'aio_flush' waits. How the request ends has no influence on this command's success.

 -P byte   the bytes must all be this one
 -v        show the bytes
 -i        only pretend: an invalid request
 -C        tell sizes and times in fields between commas
 -q        tell nothing about sizes and times`
	longAIOWrite = `
 Begins to write at offset off as many bytes as all the lengths together, and goes on without waiting.
 'aio_flush' waits. How the request ends has no influence on this command's success.

 -P byte   what to write instead of 0xcd
 -z        write zeroes, as such
 -u        with -z: the image may give the space back
 -f        the data is durable when the request ends
 -i        only pretend: an invalid request
 -C        tell sizes and times in fields between commas
 -q        tell nothing about sizes and times`
	longDiscard = `
 Says that len bytes at offset off are not needed any more.

 -C        tell sizes and times in fields between commas
 -q        tell nothing about sizes and times`
	longOpen = `
 Opens an image for the commands that follow.

 'open -n -o driver=raw /tmp/data' opens a raw image past the page cache.

 -r        to read only
 -s        what is written goes to a temporary overlay
 -C        what is read from below is copied into the image
 -n        the same as -t none
 -t mode   cache mode
 -d mode   discard mode
 -i mode   how requests are made: threads, native or io_uring
 -k        the same as -i native
 -U        bear other programs that write to the image
 -o opts   options of the image`
	longReopen = `
 Changes how the open image is open.

 'reopen -o lazy-refcounts=on' turns lazy refcounts on.

 -r        read only from now on
 -w        read and write from now on
 -c mode   cache mode
 -o opts   options of the image`
	longSigraise = `
 Sends the program itself the signal with this number: 'sigraise 9' kills it.`
)

package cli

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/internal/cli/getopt"
)

// maxNBDName is how long the name and the description of an export may be.
const maxNBDName = 4096

// IDs of the long options that have no letter.
const (
	nbdCache = 256 + iota
	nbdAIO
	nbdDiscard
	nbdDetectZeroes
	nbdObject
	nbdTLSCreds
	nbdTLSHostname
	nbdTLSAuthz
	nbdImageOpts
	nbdFork
	nbdPIDFile
	nbdSELinux
)

// qemuNBDOptions are in the order in which qemu-nbd knows them, which shows in messages.
var qemuNBDOptions = []getopt.Option{
	{ID: 'h', Short: true, Long: "help"},
	{ID: 'V', Short: true, Long: "version"},
	{ID: 'b', Short: true, Long: "bind", Arg: getopt.Required},
	{ID: 'p', Short: true, Long: "port", Arg: getopt.Required},
	{ID: 'k', Short: true, Long: "socket", Arg: getopt.Required},
	{ID: 'o', Short: true, Long: "offset", Arg: getopt.Required},
	{ID: 'r', Short: true, Long: "read-only"},
	{ID: 'A', Short: true, Long: "allocation-depth"},
	{ID: 'B', Short: true, Long: "bitmap", Arg: getopt.Required},
	{ID: 'c', Short: true, Long: "connect", Arg: getopt.Required},
	{ID: 'd', Short: true, Long: "disconnect"},
	{ID: 'L', Short: true, Long: "list"},
	{ID: 's', Short: true, Long: "snapshot"},
	{ID: 'l', Short: true, Long: "load-snapshot", Arg: getopt.Required},
	{ID: 'n', Short: true, Long: "nocache"},
	{ID: nbdCache, Long: "cache", Arg: getopt.Required},
	{ID: nbdAIO, Long: "aio", Arg: getopt.Required},
	{ID: nbdDiscard, Long: "discard", Arg: getopt.Required},
	{ID: nbdDetectZeroes, Long: "detect-zeroes", Arg: getopt.Required},
	{ID: 'e', Short: true, Long: "shared", Arg: getopt.Required},
	{ID: 'f', Short: true, Long: "format", Arg: getopt.Required},
	{ID: 't', Short: true, Long: "persistent"},
	{ID: 'v', Short: true, Long: "verbose"},
	{ID: nbdObject, Long: "object", Arg: getopt.Required},
	{ID: 'x', Short: true, Long: "export-name", Arg: getopt.Required},
	{ID: 'D', Short: true, Long: "description", Arg: getopt.Required},
	{ID: nbdTLSCreds, Long: "tls-creds", Arg: getopt.Required},
	{ID: nbdTLSHostname, Long: "tls-hostname", Arg: getopt.Required},
	{ID: nbdTLSAuthz, Long: "tls-authz", Arg: getopt.Required},
	{ID: nbdImageOpts, Long: "image-opts"},
	{ID: 'T', Short: true, Long: "trace", Arg: getopt.Required},
	{ID: nbdFork, Long: "fork"},
	{ID: nbdPIDFile, Long: "pid-file", Arg: getopt.Required},
	{ID: nbdSELinux, Long: "selinux-label", Arg: getopt.Required},
}

// qemuNBD is one run of drover under the name of qemu-nbd.
type qemuNBD struct {
	*app
	args []string // as they were given, for the process in the background

	port, bind, socket      string
	export                  *string // its name
	description             string
	shared                  int
	persistent, verbose     bool
	list                    bool
	connect                 string
	disconnect              bool
	fork                    bool
	pidFile, selinux        string
	source                  source
	offset                  uint64
	readOnly                bool
	overlay                 bool // -s
	snapshot                *image.SnapshotRef
	bitmaps                 []string
	depth                   bool
	mode                    block.Mode
	seenCache               bool
	seenAIO                 bool
	nativeAIO               bool
	seenDiscard             bool
	objects                 netObjects
	creds, hostname, authz  string
	image                   string
	helpWanted, showVersion bool
}

// runQemuNBD is drover under the name of qemu-nbd.
func (a *app) runQemuNBD(ctx context.Context, args []string) error {
	n := &qemuNBD{app: a, args: args, shared: 1}
	n.source.noDiscard = true
	if err := n.parse(args); err != nil {
		return err
	}
	switch {
	case n.helpWanted:
		a.printf("%s", qemuNBDHelp)
		return nil
	case n.showVersion:
		a.printf("%s %s (%s %s)\nCopyright (c) the drover authors\n", a.name, standsFor, program, version())
		return nil
	}
	return n.run(ctx)
}

// errStop ends the reading of a command line that needs no more of it.
var errStop = errors.New("enough has been read")

// hint is what follows a mistake in the command line. getopt's own messages and it are separate ones.
func (n *qemuNBD) hint(err error) error {
	return thenf(err, "Try `%s --help' for more information.", n.app.name)
}

func (n *qemuNBD) parse(args []string) error {
	rest, err := getopt.Parse(qemuNBDOptions, args, n.option)
	var mistake *getopt.Error
	switch {
	case errors.Is(err, errStop):
		return nil
	case errors.As(err, &mistake):
		return n.hint(err)
	case err != nil:
		return err
	}
	return n.arguments(rest)
}

// option takes one option, in the order of the command line: the first mistake is the one that is told.
func (n *qemuNBD) option(id rune, value string) error {
	switch id {
	case 'h':
		n.helpWanted = true
		return errStop
	case 'V':
		n.showVersion = true
		return errStop
	case 'p':
		n.port = value
	case 'b':
		n.bind = value
	case 'k':
		n.socket = value
		if !strings.HasPrefix(value, "/") {
			return errorf("socket path must be absolute")
		}
	case 'e':
		return n.setShared(value)
	case 't':
		n.persistent = true
	case 'v':
		n.verbose = true
	case 'L':
		n.list = true
	case 'T': // events of QEMU's own code, of which there are none here
	case 'c':
		n.connect = value
	case 'd':
		n.disconnect = true
	case nbdFork:
		n.fork = true
	case nbdPIDFile:
		n.pidFile = value
	case nbdSELinux:
		n.selinux = value
	case nbdObject:
		return n.objects.add(value)
	case nbdTLSCreds:
		n.creds = value
	case nbdTLSHostname:
		n.hostname = value
	case nbdTLSAuthz:
		n.authz = value
	case 'x':
		n.export = &value
		if len(value) > maxNBDName {
			return errorf("export name '%s' too long", value)
		}
	case 'D':
		n.description = value
		if len(value) > maxNBDName {
			return errorf("export description '%s' too long", value)
		}
	default:
		return n.imageOption(id, value)
	}
	return nil
}

// imageOption takes an option about the image.
func (n *qemuNBD) imageOption(id rune, value string) error {
	switch id {
	case 'f':
		n.source.format = value
	case nbdImageOpts:
		n.source.imageOpts = true
	case 'o':
		return n.setOffset(value)
	case 'r':
		n.readOnly = true
	case 's':
		n.overlay = true
	case 'l':
		return n.setSnapshot(value)
	case 'A':
		n.depth = true
	case 'B':
		n.bitmaps = append(n.bitmaps, value)
	case 'n':
		return n.setCache("none")
	case nbdCache:
		return n.setCache(value)
	case nbdAIO:
		return n.setAIO(value)
	case nbdDiscard:
		return n.setDiscard(value)
	case nbdDetectZeroes:
		return n.setDetectZeroes(value)
	}
	return nil
}

func (n *qemuNBD) setShared(text string) error {
	v, err := strconv.ParseInt(text, 0, 32)
	if err != nil || v < 0 {
		return errorf("Invalid shared device number '%s'", text)
	}
	n.shared = int(v)
	return nil
}

func (n *qemuNBD) setOffset(text string) error {
	v, err := strconv.ParseUint(strings.TrimPrefix(text, "+"), 0, 64)
	if err == nil {
		n.offset = v
		return nil
	}
	// A negative number is one too, for who reads it as qemu-nbd does, but not one that anybody can mean.
	if v, err := strconv.ParseInt(text, 0, 64); err == nil && v < 0 {
		return errorf("Parameter 'offset' expects a non-negative number below 2^64\n" +
			"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.")
	}
	return errorf("Invalid offset '%s'", text)
}

func (n *qemuNBD) setSnapshot(text string) error {
	ref, err := image.ParseSnapshotRef(text)
	if err == nil {
		n.snapshot, n.readOnly = &ref, true
		return nil
	}
	return thenf(badSnapshotParameter(text), "Failed in parsing snapshot param `%s'", text)
}

func (n *qemuNBD) setCache(mode string) error {
	if n.seenCache {
		return errorf("-n and --cache can only be specified once")
	}
	n.seenCache = true
	switch mode {
	case "none", "off":
		n.source.direct = true
	case "directsync":
		n.source.direct, n.mode.Writethrough = true, true
	case "writethrough":
		n.mode.Writethrough = true
	case "unsafe":
		n.mode.NoFlush = true
	case "writeback":
	default:
		return errorf("Invalid cache mode `%s'", mode)
	}
	return nil
}

func (n *qemuNBD) setAIO(mode string) error {
	if n.seenAIO {
		return errorf("--aio can only be specified once")
	}
	n.seenAIO = true
	switch mode {
	case "native":
		n.nativeAIO = true
	case "threads", "io_uring":
	default:
		return errorf("Invalid aio mode '%s'", mode)
	}
	return nil
}

func (n *qemuNBD) setDiscard(mode string) error {
	if n.seenDiscard {
		return errorf("--discard can only be specified once")
	}
	n.seenDiscard = true
	switch mode {
	case "ignore", "off":
	case "unmap", "on":
		n.source.noDiscard = false
	default:
		return errorf("Invalid discard mode `%s'", mode)
	}
	return nil
}

func (n *qemuNBD) setDetectZeroes(mode string) error {
	switch mode {
	case "off":
		n.mode.DetectZeroes = block.DetectOff
	case "on":
		n.mode.DetectZeroes = block.DetectOn
	case "unmap":
		if n.source.noDiscard {
			return errorf("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
		}
		n.mode.DetectZeroes = block.DetectUnmap
	default:
		return errorf("Failed to parse detect_zeroes mode: invalid parameter value: %s", mode)
	}
	return nil
}

// arguments takes what is no option, and looks at whether the options go together.
func (n *qemuNBD) arguments(rest []string) error {
	if n.list {
		switch {
		case len(rest) > 0:
			return errorf("List mode is incompatible with a file name")
		case n.perDevice():
			return errorf("List mode is incompatible with per-device settings")
		case n.fork:
			return errorf("List mode is incompatible with forking")
		}
		return nil
	}
	if len(rest) != 1 {
		n.say("Invalid number of arguments")
		fmt.Fprintf(n.err, "Try `%s --help' for more information.\n", n.app.name)
		return &exitError{code: 1}
	}
	n.image = rest[0]
	return nil
}

func (n *qemuNBD) perDevice() bool {
	return n.export != nil || n.description != "" || n.offset != 0 || n.connect != "" || n.disconnect || n.source.format != "" ||
		n.snapshot != nil || len(n.bitmaps) > 0 || n.depth || n.seenAIO || n.seenDiscard || n.seenCache
}

// unixSocket is the socket to listen on, or "": with a device of the kernel, one that is called after it.
func (n *qemuNBD) unixSocket() string {
	if n.socket == "" && n.connect != "" {
		return "/var/lock/qemu-nbd-" + filepath.Base(n.connect)
	}
	return n.socket
}

// checkedOffset is the offset as a device has it.
func (n *qemuNBD) checkedOffset(size int64) (int64, error) {
	if n.offset > math.MaxInt64 || int64(n.offset) > size {
		return 0, errorf("Offset (%d) cannot be greater than size of the containing file (%d)", n.offset, size)
	}
	return int64(n.offset), nil
}

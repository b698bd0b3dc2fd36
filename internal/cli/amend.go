package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// amender is one run of amend.
type amender struct {
	*app
	output       string
	changed      bool
	src          source
	optionTexts  []string
	cache        string
	quiet, force bool
	progress     progressFlag

	options map[string]string
}

// amendOptions are the options of qcow2 that can be changed. Those of encryption are understood, and refused where there is
// none.
var amendOptions = []createOption{
	{"backing_file", "str", "File name of a base image", ""},
	{"backing_fmt", "str", "Image format of the base image", ""},
	{"compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])", ""},
	{"data_file", "str", "File name of an external data file", ""},
	{"data_file_raw", "bool", "The external data file must stay valid as a raw image", ""},
	{"encrypt.iter-time", "num", "Time to spend in PBKDF in milliseconds", ""},
	{"encrypt.keyslot", "num", "Select a single keyslot to modify explicitly", ""},
	{"encrypt.new-secret", "str", "New secret to set in the matching keyslots. Empty string to erase", ""},
	{"encrypt.old-secret", "str", "Select all keyslots that match this password", ""},
	{"encrypt.state", "str", "Select new state of affected keyslots (active/inactive)", ""},
	{"lazy_refcounts", "bool", "Postpone refcount updates", ""},
	{"refcount_bits", "num", "Width of a reference count entry in bits", ""},
	{"size", "size", "Virtual disk size", ""},
}

// createOnly are options of create that cannot be changed afterwards.
var createOnly = []string{
	"cluster_size", "compression_type", "encryption", "extended_l2", "preallocation", "encrypt.format", "encrypt.key-secret",
	"encrypt.cipher-alg", "encrypt.cipher-mode", "encrypt.ivgen-alg", "encrypt.ivgen-hash-alg", "encrypt.hash-alg",
}

func (a *app) amendCommand() *cobra.Command {
	m := &amender{app: a}
	cmd := &cobra.Command{
		Use:   "amend [flags] -o OPTIONS FILE",
		Short: "Change properties of an image",
		Long: `Change properties of an image that were chosen when it was created.
'drover amend -f qcow2 -o help' lists those that can be changed.`,
		Example: `  drover amend -o compat=0.10 disk.qcow2
  drover amend -p -o refcount_bits=64,lazy_refcounts=on disk.qcow2`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(m.output); err != nil {
				return err
			}
			began := time.Now()
			err := m.run(cmd.Context(), args)
			if err != nil || !m.changed || m.output != "json" {
				return err
			}
			return m.printResult(cmd.Context(), "amend", began, m.src)
		},
	}
	f := cmd.Flags()
	m.src.add(cmd)
	if a.name == program {
		resultFlag(cmd, &m.output)
	} else {
		m.output = "human"
	}
	f.StringArrayVarP(&m.optionTexts, "options", "o", nil, "`options` to change: NAME=VALUE,...")
	addProgress(f, &m.progress)
	f.BoolVarP(&m.quiet, "quiet", "q", false, "print nothing but errors")
	f.BoolVar(&m.force, "force", false, "allow what may lose the last key of an encrypted image")
	cacheFlag(f, &m.cache)
	m.src.policy.add(f)
	return cmd
}

func (m *amender) run(ctx context.Context, args []string) (err error) {
	if len(m.optionTexts) == 0 {
		return usagef("Must specify options (-o)")
	}
	for _, text := range m.optionTexts {
		if slices.Contains(splitOptions(text), "") {
			return errorf("Invalid option list: %s", text)
		}
	}
	help := slices.ContainsFunc(m.optionTexts, func(text string) bool {
		parts := splitOptions(text)
		return slices.Contains(parts, "help") || slices.Contains(parts, "?")
	})
	if help && m.src.format != "" {
		return m.printHelp(m.src.format)
	}
	if len(args) != 1 {
		return errorf("Expecting one image file name")
	}
	if err := checkCache(m.cache); err != nil {
		return err
	}
	if err := m.src.set(args[0]); err != nil {
		return err
	}
	dev, err := m.openDevice(ctx, &m.src, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	if help {
		return m.printHelp(dev.Info().Format)
	}
	im, ok := dev.(*qcow2.Image)
	if !ok {
		return noAmend(dev.Info().Format)
	}
	err = m.amend(ctx, im)
	m.changed = err == nil
	return err
}

func noAmend(format string) error {
	return errorf("Format driver '%s' does not support option amendment", format)
}

func (m *amender) printHelp(format string) error {
	if err := checkFormat(format); err != nil {
		return err
	}
	if format != "qcow2" {
		return noAmend(format)
	}
	kinds := map[string]string{"bool": "bool (on/off)"}
	m.printf("Amend options for '%s':\n", format)
	for _, o := range amendOptions {
		kind := o.kind
		if k, ok := kinds[kind]; ok {
			kind = k
		}
		m.printf("  %-22s - %s\n", fmt.Sprintf("%s=<%s>", o.name, kind), o.help)
	}
	return nil
}

func (m *amender) amend(ctx context.Context, im *qcow2.Image) error {
	bar := m.startProgress("amend", m.progress, m.quiet)
	o, err := m.parse()
	if keys := m.keyChange(); err == nil && keys != nil {
		err = keys.run(ctx, im)
	}
	if err == nil {
		o.Progress = bar.set
		err = im.Amend(ctx, o)
	}
	bar.end()
	if err != nil {
		return errors.New(changeReason(err))
	}
	return nil
}

// parse makes options for the image of those on the command line.
func (m *amender) parse() (o qcow2.AmendOptions, err error) {
	m.options = make(map[string]string)
	for _, text := range m.optionTexts {
		for _, part := range splitOptions(text) {
			key, value, given := strings.Cut(part, "=")
			if !given {
				value = "on" // a flag may stand for itself
			}
			if err := m.setOption(key, value); err != nil {
				return o, err
			}
		}
	}
	return m.amendOptions()
}

func (m *amender) setOption(key, value string) error {
	i := slices.IndexFunc(amendOptions, func(o createOption) bool { return o.name == key })
	if i < 0 && slices.Contains(createOnly, key) {
		return errorf("Invalid parameter '%s'\nThis option is only supported for image creation", key)
	}
	if i < 0 {
		return errorf("Invalid parameter '%s'", key)
	}
	text, err := amendOptions[i].normalize(value)
	m.options[key] = text
	return err
}

func (m *amender) amendOptions() (o qcow2.AmendOptions, err error) {
	text := func(key string) *string {
		if v, ok := m.options[key]; ok {
			return &v
		}
		return nil
	}
	flag := func(key string) *bool {
		if v, ok := m.options[key]; ok {
			on := v == "on"
			return &on
		}
		return nil
	}
	o.BackingFile, o.BackingFormat, o.DataFile = text("backing_file"), text("backing_fmt"), text("data_file")
	o.LazyRefcounts, o.DataFileRaw = flag("lazy_refcounts"), flag("data_file_raw")
	if v, ok := m.options["compat"]; ok {
		if o.Version, ok = compatVersions[v]; !ok {
			return o, errorf("Unknown compatibility level %s", v)
		}
	}
	if v, ok := m.options["refcount_bits"]; ok {
		n, err := strconv.ParseUint(v, 10, 63)
		if err != nil || n == 0 || n > 64 {
			return o, errorf("Refcount width must be a power of two and may not exceed 64 bits")
		}
		o.RefcountBits = int(n)
	}
	if v, ok := m.options["size"]; ok {
		n, err := block.ParseSize(v)
		if err != nil {
			return o, err
		}
		if n%storage.SectorSize != 0 {
			return o, errorf("The new size must be a multiple of %d", storage.SectorSize)
		}
		o.Size = &n
	}
	return o, nil
}

// compatVersions are the names of the format's versions.
var compatVersions = map[string]int{"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}

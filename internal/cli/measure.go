package cli

import (
	"context"
	"errors"
	"maps"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
)

func (a *app) measureCommand() *cobra.Command {
	var m measurement
	cmd := &cobra.Command{
		Use:   "measure [flags] --size SIZE | FILE",
		Short: "Tell how large the file of a new image would become",
		Long: `Tell how large the file of a new image would become: an empty one of the given
size, or a copy of the disk in FILE.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			m.app = a
			m.sized = cmd.Flags().Changed("size")
			return m.run(cmd.Context(), args)
		},
	}
	m.src.add(cmd)
	f := cmd.Flags()
	f.StringVarP(&m.format, "target-format", "O", "raw", "`format` of the new image: raw or qcow2")
	f.StringArrayVarP(&m.options, "options", "o", nil, "`options` of its format: NAME=VALUE,...")
	f.StringVar(&m.size, "size", "", "`size` of the disk")
	f.StringVarP(&m.snapshot, "load-snapshot", "l", "", "take `SNAPSHOT` instead of the disk, by ID or name")
	outputFlag(cmd, &m.output)
	m.src.policy.add(f)
	return cmd
}

// measurement is one run of measure.
type measurement struct {
	*app
	src                    source
	format, size, snapshot string
	output                 string
	options                []string
	sized                  bool
}

// measureResult is the JSON of measure, by QEMU's names.
type measureResult struct {
	Bitmaps        *int64 `json:"bitmaps,omitempty"`
	Required       int64  `json:"required"`
	FullyAllocated int64  `json:"fully-allocated"`
}

func (m *measurement) run(ctx context.Context, args []string) (err error) {
	if err := checkOutput(m.output); err != nil {
		return err
	}
	creator := creator{app: m.app, format: m.format, optionTexts: m.options, measuring: true}
	if m.sized {
		if creator.size, err = parseSize("image size", m.size); err != nil {
			return err
		}
	}
	switch {
	case len(args) > 1:
		return errorf("At most one filename argument is allowed.")
	case len(args) == 0 && (m.src.imageOpts || m.src.format != "" || m.snapshot != ""):
		return errorf("--image-opts, -f, and -l require a filename argument.")
	case len(args) == 0 && !m.sized:
		return errorf("Either --size N or one filename must be specified.")
	case len(args) == 1 && m.sized:
		return errorf("--size N cannot be used together with a filename.")
	}
	var dev, whole block.Device
	if len(args) == 1 {
		if dev, whole, err = m.open(ctx, args[0]); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, whole.Close()) }() // and with it its snapshots
	}
	known, ok := map[string][]createOption{"raw": rawOptions, "qcow2": qcow2Options}[m.format]
	if !ok {
		return errorf("Unknown file format '%s'", m.format)
	}
	if err := creator.parseOptions(known); err != nil {
		return thenf(err, "Invalid options for file format '%s'", m.format)
	}
	if creator.secrets, err = m.src.objects.parse(); err != nil {
		return err
	}
	result, err := measure(ctx, dev, whole, &creator)
	if err != nil {
		return err
	}
	return m.print(result)
}

// open opens the image, and returns what is to be measured and the whole of it.
func (m *measurement) open(ctx context.Context, name string) (dev, whole block.Device, err error) {
	if err := m.src.set(name); err != nil {
		return nil, nil, err
	}
	whole, err = m.openDevice(ctx, &m.src, true)
	if err != nil || m.snapshot == "" {
		return whole, whole, err
	}
	if dev, err = openSnapshot(ctx, whole, m.snapshot); err != nil {
		return nil, nil, errors.Join(err, whole.Close())
	}
	return dev, whole, nil
}

func measure(ctx context.Context, dev, whole block.Device, c *creator) (image.Measurement, error) {
	if c.format == "raw" {
		size := c.size
		if dev != nil {
			size = dev.Size()
		}
		size = (size + 511) &^ 511
		return image.Measurement{Required: size, FullyAllocated: size}, nil
	}
	if c.options["encrypt.format"] != qcow2.EncryptLUKS { // nothing else takes room
		maps.DeleteFunc(c.options, func(name, _ string) bool { return strings.HasPrefix(name, "encrypt") })
	}
	if text, ok := c.options["size"]; ok && dev == nil && c.size == 0 {
		var err error
		if c.size, err = strconv.ParseInt(text, 10, 64); err != nil {
			return image.Measurement{}, err
		}
	}
	c.backing, c.backingFormat = c.options["backing_file"], c.options["backing_fmt"]
	o, err := c.qcow2Options()
	if err != nil {
		return image.Measurement{}, err
	}
	r, err := image.MeasureQCOW2(ctx, dev, whole, o)
	if errors.Is(err, image.ErrMeasureTooBig) {
		return r, errorf("The image size is too large (try using a larger cluster size)")
	}
	return r, err
}

func (m *measurement) print(r image.Measurement) error {
	if m.output == "json" {
		j := measureResult{Required: r.Required, FullyAllocated: r.FullyAllocated}
		if r.HasBitmaps {
			j.Bitmaps = &r.Bitmaps
		}
		return m.printJSON(j)
	}
	m.printf("required size: %d\nfully allocated size: %d\n", r.Required, r.FullyAllocated)
	if r.HasBitmaps {
		m.printf("bitmaps size: %d\n", r.Bitmaps)
	}
	return nil
}
